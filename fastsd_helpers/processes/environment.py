"""What a child process gets of this one's environment: a list of allowed names for each kind of child.

A token, a password, a key of another service: whatever is not named here stays in this process. What a child needs
beside these names is given to it by the one who starts it, by name.
"""

import os
import re
import site
import sysconfig
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

from fastsd_helpers.runtime import redact

__all__ = [
    "ALLOWED",
    "THIS_PYTHON",
    "Kind",
    "environment_for",
    "is_found_anyway",
    "looks_secret",
    "names_set",
    "with_this_package",
]

Kind = Literal["filter", "program", "git", "install", "proof", "tunnel", "training", "web UI"]

# Single names and no beginnings of names: NVIDIA_API_KEY, COLAB_JUPYTER_TOKEN and KAGGLE_KEY begin like the others.
# What a program needs to start at all. The mark is how a run of the tests finds what it has started.
_SYSTEM = """
    COMSPEC DYLD_FALLBACK_LIBRARY_PATH DYLD_LIBRARY_PATH FASTSD_MARK LD_LIBRARY_PATH PATH PATHEXT SYSTEMROOT WINDIR
"""
_PERSON = """
    APPDATA COLUMNS HOME HOMEDRIVE HOMEPATH LANG LANGUAGE LC_ADDRESS LC_ALL LC_COLLATE LC_CTYPE LC_IDENTIFICATION
    LC_MEASUREMENT LC_MESSAGES LC_MONETARY LC_NAME LC_NUMERIC LC_PAPER LC_TELEPHONE LC_TIME LINES LOCALAPPDATA LOGNAME
    NO_COLOR PROGRAMDATA SHELL TEMP TERM TMP TMPDIR TZ TZDIR USER USERNAME USERPROFILE XDG_CACHE_HOME XDG_CONFIG_HOME
    XDG_DATA_HOME XDG_RUNTIME_DIR XDG_STATE_HOME
"""
# A proxy may have a password in its address; without it there is no network at all.
_NETWORK = """
    ALL_PROXY CURL_CA_BUNDLE FTP_PROXY HTTPS_PROXY HTTP_PROXY NODE_EXTRA_CA_CERTS NO_PROXY REQUESTS_CA_BUNDLE
    SSL_CERT_DIR SSL_CERT_FILE all_proxy ftp_proxy http_proxy https_proxy no_proxy
"""
# Not PYTHONSTARTUP, PYTHONINSPECT, PYTHONWARNINGS, PYTHONBREAKPOINT: each can start something else.
_PYTHON = """
    PYTHONCOERCECLOCALE PYTHONDONTWRITEBYTECODE PYTHONFAULTHANDLER PYTHONHASHSEED PYTHONIOENCODING PYTHONMALLOC
    PYTHONNOUSERSITE PYTHONPYCACHEPREFIX PYTHONUNBUFFERED PYTHONUTF8
"""
# Where this very Python finds its packages: for children that run in it, and for no other Python.
THIS_PYTHON = "CONDA_PREFIX PYTHONHOME PYTHONPATH PYTHONUSERBASE VIRTUAL_ENV"
# Not TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD, which lets a model file run code, and not LD_AUDIT.
_COMPUTE = """
    ATEN_CPU_CAPABILITY BLIS_NUM_THREADS BNB_CUDA_VERSION CC CPATH CUBLAS_WORKSPACE_CONFIG CUDA_CACHE_DISABLE
    CUDA_CACHE_MAXSIZE CUDA_CACHE_PATH CUDA_DEVICE_MAX_CONNECTIONS CUDA_DEVICE_ORDER CUDA_HOME CUDA_LAUNCH_BLOCKING
    CUDA_MODULE_LOADING CUDA_PATH CUDA_ROOT CUDA_VERSION CUDA_VISIBLE_DEVICES CXX DNNL_MAX_CPU_ISA GLIBC_TUNABLES
    GOMP_CPU_AFFINITY GOMP_SPINCOUNT HIP_VISIBLE_DEVICES HSA_OVERRIDE_GFX_VERSION KMP_AFFINITY KMP_BLOCKTIME
    KMP_DUPLICATE_LIB_OK KMP_HW_SUBSET KMP_SETTINGS LD_PRELOAD LIBRARY_PATH MALLOC_ARENA_MAX MALLOC_MMAP_THRESHOLD_
    MALLOC_TRIM_THRESHOLD_ MKL_CBWR MKL_DYNAMIC MKL_ENABLE_INSTRUCTIONS MKL_NUM_THREADS MKL_SERVICE_FORCE_INTEL
    MKL_THREADING_LAYER MPLCONFIGDIR NCCL_DEBUG NCCL_P2P_DISABLE NCCL_SOCKET_IFNAME NUMBA_CACHE_DIR NUMEXPR_MAX_THREADS
    NUMEXPR_NUM_THREADS NVIDIA_DISABLE_REQUIRE NVIDIA_DRIVER_CAPABILITIES NVIDIA_REQUIRE_CUDA NVIDIA_TF32_OVERRIDE
    NVIDIA_VISIBLE_DEVICES OMP_DYNAMIC OMP_NUM_THREADS OMP_PLACES OMP_PROC_BIND OMP_SCHEDULE OMP_THREAD_LIMIT
    OMP_WAIT_POLICY ONEDNN_MAX_CPU_ISA OPENBLAS_CORETYPE OPENBLAS_NUM_THREADS PJRT_DEVICE PYTORCH_ALLOC_CONF
    PYTORCH_CUDA_ALLOC_CONF PYTORCH_ENABLE_MPS_FALLBACK PYTORCH_HIP_ALLOC_CONF PYTORCH_JIT PYTORCH_KERNEL_CACHE_PATH
    PYTORCH_MPS_HIGH_WATERMARK_RATIO PYTORCH_NO_CUDA_MEMORY_CACHING PYTORCH_NVML_BASED_CUDA_CHECK RAYON_NUM_THREADS
    ROCM_HOME ROCM_PATH ROCR_VISIBLE_DEVICES TCMALLOC_LARGE_ALLOC_REPORT_THRESHOLD TF_CPP_MIN_LOG_LEVEL
    TF_ENABLE_ONEDNN_OPTS TF_FORCE_GPU_ALLOW_GROWTH TOKENIZERS_PARALLELISM TORCHINDUCTOR_CACHE_DIR TORCH_CUDA_ARCH_LIST
    TORCH_EXTENSIONS_DIR TORCH_HOME TORCH_LOGS TRITON_CACHE_DIR VECLIB_MAXIMUM_THREADS XLA_FLAGS
    XLA_PYTHON_CLIENT_MEM_FRACTION XLA_PYTHON_CLIENT_PREALLOCATE
"""
# Where models lie and come from. HF_TOKEN_PATH, the file with a token, is not among them.
_MODELS = """
    DIFFUSERS_OFFLINE DIFFUSERS_VERBOSITY DO_NOT_TRACK GRADIO_ANALYTICS_ENABLED HF_ASSETS_CACHE
    HF_ENDPOINT HF_HOME HF_HUB_CACHE HF_HUB_DISABLE_IMPLICIT_TOKEN HF_HUB_DISABLE_PROGRESS_BARS
    HF_HUB_DISABLE_SYMLINKS_WARNING HF_HUB_DISABLE_TELEMETRY HF_HUB_DISABLE_XET HF_HUB_DOWNLOAD_TIMEOUT
    HF_HUB_ENABLE_HF_TRANSFER HF_HUB_ETAG_TIMEOUT HF_HUB_OFFLINE HF_XET_CACHE HF_XET_HIGH_PERFORMANCE
    HUGGINGFACE_HUB_CACHE TRANSFORMERS_CACHE TRANSFORMERS_OFFLINE TRANSFORMERS_VERBOSITY
"""
_OURS = """
    COLAB_GPU COLAB_RELEASE_TAG FASTSD_DEBUG FASTSD_FACE_MODEL FASTSD_FAULT FASTSD_MODELS FASTSD_PROBES FASTSD_SCRATCH
    KAGGLE_KERNEL_RUN_TYPE
"""
# Not GIT_CONFIG_COUNT and its like, which can hold a header with a token, nor GIT_DIR and its like, which lead git to
# another repository.
_GIT = """
    GIT_CONFIG_GLOBAL GIT_CONFIG_NOSYSTEM GIT_CONFIG_SYSTEM GIT_EXEC_PATH GIT_HTTP_LOW_SPEED_LIMIT
    GIT_HTTP_LOW_SPEED_TIME GIT_HTTP_PROXY_AUTHMETHOD GIT_SSL_CAINFO GIT_SSL_CAPATH GIT_SSL_NO_VERIFY
"""
# For git alone, which runs nothing of what it fetches: who has the agent's socket can use the user's keys.
_SSH = "GIT_SSH GIT_SSH_COMMAND GIT_SSH_VARIANT SSH_AUTH_SOCK"
_BUILD = """
    AR CARGO_HOME CFLAGS CMAKE_ARGS CMAKE_BUILD_PARALLEL_LEVEL CMAKE_GENERATOR CMAKE_PREFIX_PATH CPPFLAGS CXXFLAGS
    CUDACXX LDFLAGS MAKEFLAGS MAX_JOBS NETRC NVCC_APPEND_FLAGS PKG_CONFIG_PATH RUSTUP_HOME SETUPTOOLS_USE_DISTUTILS
    SOURCE_DATE_EPOCH
"""
# Read by the program that is started: another place of ngrok's agent, of gradio's (below HF_HOME), of npm's registry.
_TUNNEL = """
    FASTSD_CLOUDFLARED HF_HOME NPM_CONFIG_CACHE NPM_CONFIG_REGISTRY PYNGROK_NGROK_PATH npm_config_cache
    npm_config_registry
"""

ALLOWED: dict[str, tuple[str, ...]] = {
    "filter": (_SYSTEM,),
    "program": (_SYSTEM, _PERSON, _PYTHON),
    "git": (_SYSTEM, _PERSON, _NETWORK, _GIT, _SSH),
    "install": (_SYSTEM, _PERSON, _NETWORK, _PYTHON, _COMPUTE, _GIT, _BUILD),
    "proof": (_SYSTEM, _PERSON, _NETWORK, _PYTHON, _COMPUTE),
    "tunnel": (_SYSTEM, _PERSON, _NETWORK, _PYTHON, _TUNNEL),
    "training": (_SYSTEM, _PERSON, _NETWORK, _PYTHON, _COMPUTE, _MODELS, _OURS),
    "web UI": (_SYSTEM, _PERSON, _NETWORK, _PYTHON, _COMPUTE, _MODELS, _GIT),
}
# The settings of uv and pip, the user's own index with its password among them; publishing is nobody's business here.
_INSTALLERS = re.compile(r"(?!UV_PUBLISH_|UV_.*KEYRING)(UV|PIP)_[A-Z0-9_]+")
# Colab sets these for its own Python; an environment of ours must not follow its constraints. Settings about the
# network (index, certificates, proxy, cache) stay.
_PLATFORM_SETTINGS = """
    PIP_BUILD_CONSTRAINT PIP_CONSTRAINT PIP_REQUIRE_VIRTUALENV PIP_TARGET PIP_USER UV_BREAK_SYSTEM_PACKAGES
    UV_BUILD_CONSTRAINT UV_CONSTRAINT UV_EXCLUDE_NEWER UV_OVERRIDE UV_PRERELEASE UV_PROJECT_ENVIRONMENT UV_PYTHON
    UV_SYSTEM_PYTHON UV_TORCH_BACKEND
"""
_SECRET_NAME = re.compile(
    r"TOKEN(?!IZER)|SECRET|PASS(WORD|WD|PHRASE)?(_|$)|PASSWORD|PWD$|CRED|API_?KEY|(^|_)KEYS?(_|$)|AUTH(_|$)|COOKIE|DSN$|"
    r"DATABASE_URL|CONNECTION_STRING",
    re.IGNORECASE,
)


def environment_for(kind: Kind, *, this_python: bool = False, also: Iterable[str] = ()) -> dict[str, str]:
    """The environment for a child: of this process's own only the names that its kind of child may have.

    A value that is a secret handed out before, has the shape of a token, or is an address with a password or a token
    in it is left out under an allowed name too; proxies keep theirs, and so do the installers' settings.

    Args:
        kind: what the child is: "filter" (of a log, or of what a PDF holds), "git", "install" (uv, pip), "proof" that
            packages import, "tunnel", "training", "web UI", or any other "program".
        this_python: it runs in, or installs into, this very Python; else what belongs to this Python's own packages
            stays here, and so do the platform's rules for installing into it.
        also: further names that the user wants the child to have, whatever their values are.
    """
    allowed = {name for group in ALLOWED[kind] for name in group.split()}
    allowed |= set(THIS_PYTHON.split()) if this_python else set()
    keep_password = {*_NETWORK.split(), "HF_ENDPOINT"} if kind == "training" else set(_NETWORK.split())
    chosen = {}
    for name, value in os.environ.items():
        if kind == "install" and _INSTALLERS.fullmatch(name):
            if this_python or name not in _PLATFORM_SETTINGS.split():
                chosen[name] = value
        elif name in allowed and not _is_secret(value, may_have_password=name in keep_password):
            chosen[name] = value
    return chosen | {name: os.environ[name] for name in also if name in os.environ}


def is_found_anyway(folder: Path) -> bool:
    """Whether a folder is one of those in which every start of this Python looks for packages.

    Args:
        folder: such as the one that holds this package.
    """
    places = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    places += [*site.getsitepackages(), site.getusersitepackages()]
    return folder.resolve() in {Path(place).resolve() for place in places}


def with_this_package(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment, in which a child of this Python finds the very copy of this library that runs here.

    A folder where it looks anyway is not named: that would come before Python's own modules, and what lies in it under
    the name of one, such as the old pathlib of Colab's image of July 2025, would take its place.

    Args:
        environment: names and values; it is left as it is.
    """
    home = Path(__file__).resolve().parents[2]
    places = [*([] if is_found_anyway(home) else [str(home)]), environment.get("PYTHONPATH", "")]
    path = os.pathsep.join(filter(None, places))
    return {**environment, "PYTHONPATH": path} if path else dict(environment)


def _is_secret(value: str, *, may_have_password: bool) -> bool:
    whole = value.strip()
    shown = redact(whole)
    return bool(whole and not shown.strip("•")) or ("://" in whole and shown != whole and not may_have_password)


def looks_secret(name: str) -> bool:
    """Whether a variable of this name most likely holds a token, a key or a password, or leads to one.

    Args:
        name: of the variable.
    """
    return bool(_SECRET_NAME.search(name))


def names_set(*beginnings: str) -> list[str]:
    """The names of the variables that are set and begin like one of these, sorted; no value is looked at.

    Args:
        *beginnings: such as `HF_`.
    """
    return sorted(name for name in os.environ if name.startswith(beginnings))
