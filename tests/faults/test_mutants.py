"""The small faults that scripts/sample_faults.py puts into the code, and the probes that tell what a test reaches."""

import ast
import builtins

from faults.mutants import add_probes, choose_mutants, find_mutants

SOURCE = '''"""A module."""

LIMIT = 5


def pick(values, low=0, *, name="ü"):
    """Pick some."""
    found = [value for value in values if value > low and value != LIMIT]
    if not found:
        raise ValueError(f"nothing above {low + 1}")
    log.warning("picked %d", 3)
    total = sum(found, start=min(1, 2))
    return total if name else found[0] * 2
'''


def changes():
    return {(mutant.kind, mutant.before, mutant.after) for mutant in find_mutants(SOURCE)}


def test_every_kind_of_fault_is_put_in_at_its_place():
    found = changes()
    assert ("comparison", "value > low", "(value >= low)") in found
    assert ("comparison", "value > low", "(value < low)") in found
    assert ("and/or", "value > low and value != LIMIT", "(value > low or value != LIMIT)") in found
    assert ("part of a condition dropped", "value > low and value != LIMIT", "(value != LIMIT)") in found
    assert ("condition turned", "not found", "(found)") in found
    assert ("raise dropped", 'raise ValueError(f"nothing above {low + 1}")', "pass") in found
    assert ("constant", "5", "(6)") in found
    assert ("min/max, any/all", "min(1, 2)", "(max(1, 2))") in found
    assert ("keyword dropped", "sum(found, start=min(1, 2))", "(sum(found))") in found
    assert ("arithmetic", "found[0] * 2", "(found[0] // 2)") in found
    assert ("return value", "return total if name else found[0] * 2", "return None") in found
    assert any(kind == "filter dropped" for kind, *_rest in found)


def test_what_only_speaks_stays_as_it_is():
    assert not [
        before for _kind, before, _after in changes() if "picked" in before or before in ("3", '"ü"', "low + 1")
    ]


def test_each_mutant_is_one_change_that_compiles():
    for mutant in find_mutants(SOURCE):
        changed = mutant.put_into(SOURCE)
        assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse(SOURCE))
        assert SOURCE.encode()[mutant.start : mutant.end].decode() == mutant.before
        assert changed.splitlines()[: mutant.line - 1] == SOURCE.splitlines()[: mutant.line - 1]


def test_the_seed_chooses_and_modules_take_turns():
    sources = {"a": SOURCE, "b": SOURCE, "c": "x = 1\n"}
    chosen = choose_mutants(sources, 12, 1)
    assert chosen == choose_mutants(sources, 12, 1) != choose_mutants(sources, 12, 2)
    names = [name for name, _mutant in chosen]
    assert names[:3] == ["a", "b", "c"]
    assert (names.count("a"), names.count("b"), names.count("c")) == (6, 5, 1)
    places = [(name, mutant.start, mutant.end) for name, mutant in chosen]
    assert len(set(places)) == len(places)


def test_probes_name_the_blocks_that_were_reached_and_change_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTSD_PROBES", str(tmp_path / "reached"))
    monkeypatch.setattr(builtins, "_blocks_reached", set(), raising=False)
    space = {"log": type("Log", (), {"warning": staticmethod(lambda *_words: None)})}
    exec(compile(add_probes(SOURCE, "a"), "a", "exec"), space)
    assert space["pick"]([1, 9]) == 11
    assert space["__doc__"] == "A module."
    assert (tmp_path / "reached").read_text().split() == ["a|pick#0"]
    reached = {mutant.block for mutant in find_mutants(SOURCE) if mutant.kind == "raise dropped"}
    assert reached == {"pick#1"}
