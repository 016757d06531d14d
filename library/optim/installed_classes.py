"""Classes of installed packages, by their path: a name on the command line must not run a file of this folder."""

import importlib
import importlib.util
import inspect
import site
import sysconfig
from pathlib import Path
from typing import TypeVar

from library.config.errors import UserError

T = TypeVar("T")


def load_class(flag: str, path: str, base: type[T], kind: str) -> type[T]:
    """Return the class at `path` ("package.module.Class"), a subclass of `base`, which is a `kind` ("an optimizer").

    Raise `UserError`, which names the `flag`, unless it is one, of an installed package that can be imported.
    """
    module, _, class_name = path.rpartition(".")
    require_installed(f"{flag} {path}", module)
    try:
        found = getattr(importlib.import_module(module), class_name)
    except AttributeError as error:
        raise UserError(f"{flag} {path}: {error}.", "Check the spelling of the class.") from error
    except (Exception, SystemExit) as error:  # a stranger's module may raise anything, or end the process
        raise UserError(
            f"{flag} {path} needs '{module.partition('.')[0]}', which cannot be imported ({reason_of(error)}).",
            f"Choose another {flag}.",
        ) from error
    if not (inspect.isclass(found) and issubclass(found, base)):
        raise UserError(f"{flag} {path} is not {kind}.", f"Name a subclass of {base.__module__}.{base.__name__}.")
    return found


def reason_of(error: BaseException) -> str:
    """Return the type and the text of an error."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def require_installed(what: str, module: str) -> None:
    """Raise `UserError` unless `module` belongs to an installed package; `what` is the flag and its value."""
    top = module.partition(".")[0]
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        spec = None
    sites = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()}
    folders = [Path(each).resolve() for each in (*sites, site.getusersitepackages())]
    origins = [] if spec is None else [spec.origin, *(spec.submodule_search_locations or ())]
    found = [Path(origin).resolve() for origin in origins if origin is not None]
    if any(path.is_relative_to(folder) for path in found for folder in folders):
        return
    where = "is not installed" if not found else f"is '{found[0]}', which is no installed package"
    raise UserError(
        f"{what}: '{top}' {where}.",
        "Check the spelling. Only classes of installed packages are used.",
    )
