"""Small faults put into Python source, one at a time, and probes that tell which blocks of statements a test reaches.

A mutant is one change of one place: a comparison or its boundary, `and` for `or`, a condition turned round, a call, a
`raise`, a filter or a keyword dropped, a number changed, another value returned. What only speaks (the log, texts,
annotations, decorators) stays as it is.
"""

import ast
import copy
import random
from collections.abc import Iterator
from dataclasses import dataclass

_COMPARED = {
    ast.Lt: (ast.LtE, ast.Gt),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.Lt),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
}
_COMPUTED = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.FloorDiv,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
}
_EXCHANGED = {"min": "max", "max": "min", "any": "all", "all": "any"}
# Without these nothing that a run makes is other on a machine with UTF-8; a daemon thread ends with its process.
_KEPT_KEYWORDS = ("daemon", "encoding", "errors", "name", "help", "hint", "newline")
_LOGS = ("log", "logger", "logging", "warnings")


@dataclass(frozen=True)
class Mutant:
    """One changed place: characters `start` to `end` of the source (as UTF-8 bytes) become `after`."""

    line: int
    block: str
    kind: str
    start: int
    end: int
    before: str
    after: str

    def put_into(self, source: str) -> str:
        text = source.encode()
        return (text[: self.start] + self.after.encode() + text[self.end :]).decode()


def find_mutants(source: str) -> list[Mutant]:
    """Return every mutant of this source, in its order."""
    text = source.encode()
    tree = ast.parse(source)
    starts = [0]
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    found = []
    for changeable, block in _changeable(tree):
        for kind, node, changed in _changes(changeable):
            start = starts[node.lineno - 1] + node.col_offset
            end = starts[node.end_lineno - 1] + node.end_col_offset
            after = ast.unparse(ast.fix_missing_locations(changed))
            if isinstance(changed, ast.expr):
                after = f"({after})"
            found.append(Mutant(node.lineno, block, kind, start, end, text[start:end].decode(), after))
    return found


def choose_mutants(sources: dict[str, str], count: int, seed: int) -> list[tuple[str, Mutant]]:
    """Choose `count` mutants, taking the modules in turn; no two of them change the same place."""
    waiting = {}
    for name, source in sources.items():
        mutants = find_mutants(source)
        random.Random(f"{seed}:{name}").shuffle(mutants)
        waiting[name] = iter({(mutant.start, mutant.end): mutant for mutant in reversed(mutants)}.values())
    chosen = []
    while waiting and len(chosen) < count:
        for name in list(waiting):
            mutant = next((mutant for mutant in waiting[name] if _differs(sources[name], mutant)), None)
            if mutant is None:
                del waiting[name]
            elif len(chosen) < count:
                chosen.append((name, mutant))
    return chosen


def _differs(source: str, mutant: Mutant) -> bool:
    try:
        return ast.dump(ast.parse(mutant.put_into(source))) != ast.dump(ast.parse(source))
    except SyntaxError:
        return False


def add_probes(source: str, name: str) -> str:
    """Return the source with a call at the head of every block that notes its name in the file $FASTSD_PROBES names."""
    tree = ast.parse(source)
    for owner, field, block in list(_blocks(tree)):
        statements = getattr(owner, field)
        probe = ast.parse(f"__reached__({f'{name}|{block}'!r})").body
        at = 1 if _is_text(statements[0]) and field == "body" else 0
        statements[at:at] = probe
    after_text = 1 if _is_text(tree.body[0]) else 0
    tree.body[after_text:after_text] = ast.parse(_PROBE).body
    return ast.unparse(ast.fix_missing_locations(tree))


# Self-contained, because modules are also loaded by commands that tests start; it takes the functions it needs before
# a test replaces them. The set is shared by all modules, so that one call empties it before the next test.
_PROBE = """
def __reached__(block, seen=__import__("builtins").__dict__.setdefault("_blocks_reached", set()), os=__import__("os"),
                open=__import__("os").open, write=__import__("os").write, close=__import__("os").close):
    if block in seen:
        return
    seen.add(block)
    path = os.environ.get("FASTSD_PROBES")
    if path:
        try:
            handle = open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            write(handle, (block + "\\n").encode())
            close(handle)
        except OSError:
            pass
"""


def _blocks(tree: ast.Module) -> Iterator[tuple[ast.AST, str, str]]:
    """Yield every list of statements inside a function: its owner, the field that holds it, and its name."""

    def inside(node: ast.AST, function: str, numbers: Iterator[int] | None) -> Iterator[tuple[ast.AST, str, str]]:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            function = f"{function}.{node.name}" if function else node.name
            numbers = iter(range(10_000)) if not isinstance(node, ast.ClassDef) else None
        for field, value in ast.iter_fields(node):
            inner = value[0] if isinstance(value, list) and value else None
            if not isinstance(inner, ast.stmt | ast.excepthandler | ast.match_case):
                continue
            if numbers is not None and isinstance(inner, ast.stmt):
                yield node, field, f"{function}#{next(numbers)}"
            for child in value:
                yield from inside(child, function, numbers)

    return inside(tree, "", None)


def _changeable(tree: ast.Module) -> Iterator[tuple[ast.AST, str]]:
    """Yield the places that may be changed, each with the name of the block it stands in ("" outside functions)."""
    names = {id(getattr(owner, field)): block for owner, field, block in _blocks(tree)}

    def inside(node: ast.AST, block: str) -> Iterator[tuple[ast.AST, str]]:
        if isinstance(node, ast.JoinedStr | ast.Import | ast.ImportFrom) or _only_speaks(node):
            return
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.expr | ast.stmt) and not isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node, block
        for field, value in ast.iter_fields(node):
            if field in ("annotation", "returns", "decorator_list", "bases"):
                continue
            if isinstance(value, list):
                here = names.get(id(value), block)
                for child in value:
                    if isinstance(child, ast.AST):
                        yield from inside(child, here)
            elif isinstance(value, ast.AST):
                yield from inside(value, block)

    for statement in tree.body:
        yield from inside(statement, "")


def _only_speaks(node: ast.AST) -> bool:
    if _is_text(node):
        return True
    if isinstance(node, ast.Assign) and any(isinstance(it, ast.Name) and it.id == "__all__" for it in node.targets):
        return True
    call = node.value if isinstance(node, ast.Expr) else None
    return isinstance(call, ast.Call) and ast.unparse(call.func).lstrip("_").split(".")[0] in _LOGS


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _changes(node: ast.AST) -> Iterator[tuple[str, ast.AST, ast.AST]]:
    """Yield the kind of each fault this node allows, the place that is changed, and what it becomes."""
    if isinstance(node, ast.Compare):
        for index, operator in enumerate(node.ops):
            for other in _COMPARED[type(operator)]:
                yield "comparison", node, _with(node, ops=[*node.ops[:index], other(), *node.ops[index + 1 :]])
    elif isinstance(node, ast.BoolOp):
        yield "and/or", node, _with(node, op=ast.And() if isinstance(node.op, ast.Or) else ast.Or())
        for index in range(len(node.values)):
            rest = node.values[:index] + node.values[index + 1 :]
            yield "part of a condition dropped", node, rest[0] if len(rest) == 1 else _with(node, values=rest)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield "condition turned", node, node.operand
    elif isinstance(node, ast.IfExp):
        yield "condition turned", node, _with(node, body=node.orelse, orelse=node.body)
    elif isinstance(node, ast.BinOp) and type(node.op) in _COMPUTED and not _joins_text(node):
        yield "arithmetic", node, _with(node, op=_COMPUTED[type(node.op)]())
    elif isinstance(node, ast.Constant):
        yield from _other_constants(node)
    elif isinstance(node, ast.Call):
        yield from _other_calls(node)
    elif isinstance(node, ast.ListComp | ast.SetComp | ast.GeneratorExp | ast.DictComp):
        for index, loop in enumerate(node.generators):
            if loop.ifs:
                bare = _with(loop, ifs=loop.ifs[1:])
                yield (
                    "filter dropped",
                    node,
                    _with(node, generators=[*node.generators[:index], bare, *node.generators[index + 1 :]]),
                )
    elif isinstance(node, ast.stmt):
        yield from _other_statements(node)


def _other_constants(node: ast.Constant) -> Iterator[tuple[str, ast.AST, ast.AST]]:
    value = node.value
    if isinstance(value, bool):
        yield "constant", node, ast.Constant(not value)
    elif isinstance(value, int) and abs(value) <= 64:
        yield "constant", node, ast.Constant(value + 1)
        if value > 0:
            yield "constant", node, ast.Constant(value - 1)
    elif isinstance(value, int | float):
        # One more of a large number is no fault that anyone could meet.
        yield "constant", node, ast.Constant(value * 2)
        yield "constant", node, ast.Constant(type(value)(value / 2))


def _other_calls(node: ast.Call) -> Iterator[tuple[str, ast.AST, ast.AST]]:
    if isinstance(node.func, ast.Name) and node.func.id in _EXCHANGED:
        yield "min/max, any/all", node, _with(node, func=ast.Name(_EXCHANGED[node.func.id]))
    for index, keyword in enumerate(node.keywords):
        if keyword.arg is not None and keyword.arg not in _KEPT_KEYWORDS:
            yield "keyword dropped", node, _with(node, keywords=node.keywords[:index] + node.keywords[index + 1 :])


def _other_statements(node: ast.stmt) -> Iterator[tuple[str, ast.AST, ast.AST]]:
    if isinstance(node, ast.If | ast.While):
        if not isinstance(node.test, ast.UnaryOp | ast.Compare | ast.Constant):
            yield "condition turned", node.test, ast.UnaryOp(ast.Not(), node.test)
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call | ast.Await):
        yield "call dropped", node, ast.Pass()
    elif isinstance(node, ast.Raise):
        yield "raise dropped", node, ast.Pass()
    elif isinstance(node, ast.AugAssign) and type(node.op) in _COMPUTED:
        yield "arithmetic", node, _with(node, op=_COMPUTED[type(node.op)]())
    elif isinstance(node, ast.Break):
        yield "loop", node, ast.Continue()
    elif isinstance(node, ast.Continue):
        yield "loop", node, ast.Pass()
    elif isinstance(node, ast.Return) and node.value is not None:
        value = node.value
        if not (isinstance(value, ast.Constant) and value.value is None):
            yield "return value", node, _with(node, value=ast.Constant(None))


def _joins_text(node: ast.BinOp) -> bool:
    parts = list(ast.walk(node))
    texts = [part for part in parts if isinstance(part, ast.Constant) and isinstance(part.value, str)]
    return bool(texts) or any(isinstance(part, ast.JoinedStr) for part in parts)


def _with(node: ast.AST, **fields: object) -> ast.AST:
    changed = copy.copy(node)
    for name, value in fields.items():
        setattr(changed, name, value)
    return changed
