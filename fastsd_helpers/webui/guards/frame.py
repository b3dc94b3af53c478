"""What every guard uses: patches put in when a module is imported, a proof before the first port is opened, the run.

A guard is started as `python -u guards/NAME.py ENTRY ARGUMENTS...` with FASTSD_GUARD={"admin": false, ...} (JSON):

    from frame import Refused, patch, run, setting

    @patch("folder_paths", "get_annotated_filepath", "name default_dir=")
    def _(original):                                # gets the original, returns what takes its place
        def get_annotated_filepath(name, default_dir=None):
            ...                                     # raise Refused("...") for what a visitor may not do
        return get_annotated_filepath

    run()

The third argument names the parameters that the original must have ("=": it has a default, "*" and "**" as written);
with None they are not compared. `late=True`: the module may be imported after the first port is opened;
`optional=True`: it may never be. Whatever is missing, has other parameters, or was replaced again when the web UI is
about to listen ends the process with one line, so that it is never open without its guard. `wrapped=True`: a part of
the web UI is known to put a function of its own around it, which the last of these looks leaves out.
`before(module, name, parameters)` registers a check: it gets the arguments, and the original is called when it has
refused nothing. `when_loaded(module)` registers a function that gets a module after its import, for what is added and
not replaced.
"""

import functools
import importlib.abc
import importlib.machinery
import inspect
import json
import os
import runpy
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = [
    "Refused",
    "apply",
    "before",
    "inside",
    "missing",
    "only_near",
    "patch",
    "prove",
    "run",
    "setting",
    "when_loaded",
]

_MARK = "__fastsd_guard__"


class Refused(PermissionError):
    """A visitor asked for what a link is not for."""

    def __init__(self, what: str) -> None:
        super().__init__(f"fastsd guard: {what}")
        # AUTOMATIC1111's API takes the answer's code from here.
        self.status_code, self.detail = 403, f"fastsd guard: {what}"


@dataclass
class Patch:
    """One function to be replaced."""

    module: str
    name: str  # dotted below the module: "File.preprocess"
    parameters: str | None
    make: Callable[[Any], Any]
    late: bool = False
    optional: bool = False
    wrapped: bool = False
    replacement: Any = None


_patches: list[Patch] = []
_hooks: list[tuple[str, Callable[[Any], None]]] = []
_settings: dict[str, Any] = {}


def setting(name: str, default: Any = None) -> Any:
    """What the launcher said in FASTSD_GUARD; the variable is read once and taken away from the web UI."""
    text = os.environ.pop("FASTSD_GUARD", None)
    if text is not None:
        _settings.update(json.loads(text))
    return _settings.get(name, default)


def missing(name: str, module: str, why: str = "is not there") -> None:
    """End the process: without this function the guard does not hold. Threads and `except` cannot keep it alive."""
    sys.stdout.flush()
    sys.stderr.write(f"fastsd guard: {name} of {module} {why}; the web UI is not started without it.\n")
    sys.stderr.flush()
    os._exit(3)


def inside(path: str | os.PathLike[str], folders: Sequence[str | os.PathLike[str]]) -> bool:
    """Whether a path, with every link followed, lies below one of these folders."""
    real = os.path.realpath(os.fspath(path))
    for folder in folders:
        root = os.path.realpath(os.fspath(folder))
        if root != os.sep and real.startswith(root + os.sep):
            return True
    return False


def patch(
    module: str,
    name: str,
    parameters: str | None,
    *,
    late: bool = False,
    optional: bool = False,
    wrapped: bool = False,
) -> Callable[[Callable[[Any], Any]], Callable[[Any], Any]]:
    """Register a patch, see the head of this file; put in at once when the module is there already."""

    def register(make: Callable[[Any], Any]) -> Callable[[Any], Any]:
        item = Patch(module, name, parameters, make, late, optional, wrapped)
        _patches.append(item)
        if module in sys.modules:
            _put_in(item, sys.modules[module])
        return make

    return register


def before(
    module: str, name: str, parameters: str | None, **more: bool
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a check as a patch: it gets the arguments of every call, and raises for what a visitor may not do."""

    def register(check: Callable[..., None]) -> Callable[..., None]:
        @patch(module, name, parameters, **more)
        def _(original: Any) -> Any:
            def checked(*arguments: Any, **named: Any) -> Any:
                check(*arguments, **named)
                return original(*arguments, **named)

            return checked

        return check

    return register


def when_loaded(module: str) -> Callable[[Callable[[Any], None]], Callable[[Any], None]]:
    """Register a function that is called with a module once it is imported."""

    def register(hook: Callable[[Any], None]) -> Callable[[Any], None]:
        _hooks.append((module, hook))
        if module in sys.modules:
            hook(sys.modules[module])
        return hook

    return register


def apply(module_name: str, module: Any) -> None:
    """Put in what is registered for a module that was just loaded."""
    for name, hook in _hooks:
        if name == module_name:
            hook(module)
    for item in _patches:
        if item.module == module_name:
            _put_in(item, module)


def _owner(item: Patch, module: Any) -> tuple[Any, str]:
    owner, *rest = item.name.split(".")
    place, last = module, owner
    for part in rest:
        place, last = getattr(place, last, None), part
    # A method that is only inherited counts as missing: another class would keep the original.
    if place is None or last not in vars(place):
        missing(item.name, item.module)
    return place, last


def _put_in(item: Patch, module: Any) -> None:
    place, last = _owner(item, module)
    kept = vars(place)[last]
    plain = kept.__func__ if isinstance(kept, (staticmethod, classmethod)) else kept
    if item.parameters is not None and _parameters(plain) != item.parameters:
        missing(item.name, item.module, f"takes ({_parameters(plain)}), not ({item.parameters})")
    made = item.make(plain)
    if callable(made) and not isinstance(made, type):
        # Gradio and FastAPI read the signature, which stays the original's.
        functools.update_wrapper(made, plain)
        setattr(made, _MARK, True)
    item.replacement = made
    setattr(place, last, type(kept)(made) if isinstance(kept, (staticmethod, classmethod)) else made)


def _parameters(function: Any) -> str:
    if not callable(function):
        return "no function"
    try:
        found = inspect.signature(function, follow_wrapped=False).parameters.values()
    except (TypeError, ValueError):
        return "unknown"
    marks: dict[Any, str] = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    empty = inspect.Parameter.empty
    return " ".join(f"{marks.get(p.kind, '')}{p.name}{'' if p.default is empty else '='}" for p in found)


class _Loader(importlib.abc.Loader):
    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> Any:
        return self._loader.create_module(spec)

    def exec_module(self, module: Any) -> None:
        self._loader.exec_module(module)
        apply(module.__spec__.name, module)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if not any(item.module == name for item in _patches) and not any(wanted == name for wanted, _hook in _hooks):
            return None
        for finder in sys.meta_path:
            look = getattr(finder, "find_spec", None)
            spec = look(name, path, target) if look is not None and finder is not self else None
            if spec is not None:
                if spec.loader is not None and hasattr(spec.loader, "exec_module"):
                    spec.loader = _Loader(spec.loader)
                return spec
        return None


def prove(*, late: bool = False) -> None:
    """End the process unless every patch is in its place; called by itself before a port is opened.

    Args:
        late: those that may come after the port must be there by now too.
    """
    for item in list(_patches):
        if item.replacement is None:
            if not item.optional and (late or not item.late):
                missing(item.name, item.module, "was never loaded")
            continue
        if item.wrapped or item.module not in sys.modules:
            continue  # loaded past the import system, or taken out of it again: nobody can replace it there
        place, last = _owner(item, sys.modules[item.module])
        found = getattr(place, last, None)
        seen = 0
        while found is not None and found is not item.replacement and not getattr(found, _MARK, False) and seen < 20:
            found, seen = getattr(found, "__wrapped__", getattr(found, "__func__", None)), seen + 1
        if found is None or seen == 20:
            missing(item.name, item.module, "was replaced by something else")


def _at_bind(event: str, arguments: tuple[Any, ...]) -> None:
    # Port 0 is no server of the web UI: urllib3 asks so whether there is IPv6, when it is imported.
    if event == "socket.bind" and isinstance(arguments[1], tuple) and arguments[1][1] != 0:
        prove()


def only_near(port: Callable[[], int | None]) -> None:
    """From now on refuse connections to addresses of this machine and its network, except to the web UI's own port.

    An address that a visitor names must not reach what only this machine can reach, whatever function fetches it. A
    proxy that the environment names stays reachable.
    """
    import ipaddress
    from urllib.parse import urlsplit

    names = ("http_proxy", "https_proxy", "all_proxy")
    proxies = {urlsplit(os.environ.get(name, "") or os.environ.get(name.upper(), "")).hostname for name in names}

    def look(event: str, arguments: tuple[Any, ...]) -> None:
        if event != "socket.connect" or not isinstance(arguments[1], tuple):
            return
        host, number = str(arguments[1][0]).split("%")[0], arguments[1][1]
        if number == port() or host in proxies:
            return
        try:
            address = ipaddress.ip_address(host)
        except ValueError:
            # A name: it is looked up on the way. Only names of this machine are meant by the rule.
            if host.lower().rstrip(".") in ("localhost", ""):
                raise Refused(f"no connection to {host}:{number}") from None
            return
        address = getattr(address, "ipv4_mapped", None) or address
        if not address.is_global:
            raise Refused(f"no connection to {host}:{number}")

    sys.addaudithook(look)


def run(argv: Sequence[str] | None = None) -> None:
    """Run the launcher named by the first argument as if Python had been started with it."""
    words = list(sys.argv[1:] if argv is None else argv)
    setting("admin")  # reads the variable, and takes it away
    # torch heeds it more than the caller's own wish: files would be unpickled without a look.
    os.environ.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None)
    sys.meta_path.insert(0, _Finder())
    sys.addaudithook(_at_bind)
    here = os.path.dirname(os.path.abspath(__file__))
    for name, module in list(sys.modules.items()):
        # Names that the web UI's own code may use for modules of its own.
        if name != "__main__" and os.path.dirname(getattr(module, "__file__", None) or "") == here:
            del sys.modules[name]
    entry = os.path.abspath(words[0])
    sys.argv = [words[0], *words[1:]]
    sys.path[0] = os.path.dirname(entry)
    runpy.run_path(words[0], run_name="__main__")
