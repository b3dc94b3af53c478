"""What a set asks for and a Python lacks, on small sets made here: who is asked, what stays, what is refused."""

import re
import sys
from pathlib import Path

import pytest

from fastsd_helpers.errors import DependencyMissing, InstallError
from fastsd_helpers.wheels.difference import Plan, has_all, is_protected, make_plan, matches, names_to_ask
from fastsd_helpers.wheels.environment import Environment
from fastsd_helpers.wheels.lockfile import LockedFile, LockedRow, LockSet


def row(name: str, version: str, *needs: str, size: int = 10) -> LockedRow:
    files = (LockedFile(f"{name}-{version}-py3-none-any.whl", size, "0" * 64),)
    return LockedRow(name, version, files, f"{name}=={version}", needs=needs)


def lock_set(wanted: list[str], *rows: LockedRow, own: bool = False) -> LockSet:
    return LockSet("little", "3.13", own, "linux x86_64", tuple(wanted), rows, "", "")


def environment(**installed: str) -> Environment:
    here = Path("/nowhere")
    found = {name.replace("_", "-"): version for name, version in installed.items()}
    return Environment(here, "3.13.1", here, here, "linux x86_64", False, found, False)


def changes(plan: Plan) -> list[tuple]:
    return [(change.name, change.before, change.after, change.reason) for change in plan.changes]


SET = lock_set(
    ["Alpha_One>=1,<3", "gamma>=0.1"],
    row("alpha-one", "2.0", "beta>=2", "delta", size=100),
    row("beta", "2.5", "epsilon>=1", size=20),
    row("delta", "1.0", size=3),
    row("epsilon", "1.1", size=4),
    row("gamma", "0.3", size=5000),
)


def test_all_of_a_set_is_asked_about_and_what_its_members_need():
    assert names_to_ask(SET) == {"alpha-one", "beta", "gamma", "delta", "epsilon"}
    elsewhere = lock_set(["alpha>=1"], row("alpha", "1.0", "numpy>=1.20"))
    assert names_to_ask(elsewhere) == {"alpha", "numpy"}
    assert names_to_ask(lock_set(["zeta"], row("alpha", "1.0", "numpy>=1.20"), own=True)) == {"alpha"}


def test_every_build_of_a_library_is_asked_about_when_one_is():
    asked = names_to_ask(lock_set(["opencv-python-headless>=4"], row("opencv-python-headless", "4.9")))
    assert asked == {
        "opencv-python", "opencv-python-headless", "opencv-contrib-python", "opencv-contrib-python-headless",
    }  # fmt: skip
    assert names_to_ask(lock_set(["onnxruntime"], row("onnxruntime", "1.0"))) == {"onnxruntime", "onnxruntime-gpu"}


def test_what_is_absent_brings_its_own_needs_and_says_who_asked():
    plan = make_plan(SET, environment())
    assert changes(plan) == [
        ("alpha-one", None, "2.0", "fastsd needs Alpha_One<3,>=1"),
        ("gamma", None, "0.3", "fastsd needs gamma>=0.1"),
        ("beta", None, "2.5", "alpha-one needs beta>=2"),
        ("delta", None, "1.0", "alpha-one needs delta"),
        ("epsilon", None, "1.1", "beta needs epsilon>=1"),
    ]
    assert [item.name for item in plan.rows] == [name for name, *_ in changes(plan)]
    assert (plan.kept, plan.bytes) == (0, 5127)
    assert plan.in_part == ()


def test_what_is_there_and_fits_stays_and_its_needs_are_its_own_business():
    plan = make_plan(SET, environment(alpha_one="1.0", gamma="0.1"))
    assert (plan.changes, plan.kept, plan.bytes) == ((), 5, 0)
    plan = make_plan(SET, environment(gamma="0.2rc1", beta="2.0", epsilon="9"))
    assert changes(plan) == [
        ("alpha-one", None, "2.0", "fastsd needs Alpha_One<3,>=1"),
        ("delta", None, "1.0", "alpha-one needs delta"),
    ]
    assert (plan.kept, plan.left) == (3, ())


@pytest.mark.parametrize("version", ["1", "2.9.9", "3.0", "4.1", "3.0+cu128"])
def test_nothing_that_is_there_changes_and_what_is_newer_than_was_tried_is_told(version):
    plan = make_plan(SET, environment(alpha_one=version, gamma="0.3", beta="2", delta="1"))
    assert plan.changes == ()
    newer = version[0] in "34"
    assert plan.left == ((f"alpha-one {version} (fastsd asks for <3,>=1)",) if newer else ())


@pytest.mark.parametrize(
    ("asked", "version", "stays"),
    [
        ("<2", "2", True), ("<=2", "2.1", True), ("==2", "2.1", True), ("==2.*", "3.0", True), ("~=2.1", "3.0", True),
        ("==2", "1.9", False), ("==2.*", "1.9", False), ("~=2.1", "2.0", False), (">=2,<3", "1.9", False),
        (">2", "2", False), (">=1,!=1.5", "1.5", False), ("<2,!=3.1", "3.1", False), ("<2,!=3.1", "3.2", True),
        ("==2.0", "2.0+cpu", True), ("===2.0", "2.1", False), (">=2", "2.0rc1", False), ("<2", "2.0rc1", True),
    ],
)  # fmt: skip
def test_an_upper_bound_moves_no_package_and_a_lower_one_is_told(asked, version, stays):
    little = lock_set([f"a{asked}"], row("a", "2.0"))
    if stays:
        plan = make_plan(little, environment(a=version))
        assert (plan.changes, plan.kept) == ((), 1)
        assert has_all(little, environment(a=version))
        return
    with pytest.raises(
        InstallError, match=re.escape(f"Too old here for 'little': a {version} (fastsd needs")
    ) as caught:
        make_plan(little, environment(a=version))
    assert "pip install --upgrade 'a" in caught.value.hint
    assert not has_all(little, environment(a=version))
    assert make_plan(little, environment(a=version), skip=("A",)).changes == ()


def test_all_that_is_too_old_is_told_at_once_with_who_needs_it_and_nothing_of_it_is_planned():
    with pytest.raises(InstallError, match="installed versions are never changed") as caught:
        make_plan(SET, environment(gamma="0.0.9", beta="1.9"))
    assert "beta 1.9 (alpha-one needs >=2), gamma 0.0.9 (fastsd needs >=0.1)" in caught.value.problem
    assert "--upgrade 'beta>=2' 'gamma>=0.1'" in caught.value.hint


def test_the_newer_one_of_the_platforms_own_stays_too():
    heavy = lock_set(["a"], row("a", "1", "numpy<2.4,>=2"))
    plan = make_plan(heavy, environment(numpy="2.5"))
    assert [name for name, *_ in changes(plan)] == ["a"]
    assert plan.left == ("numpy 2.5 (a asks for <2.4,>=2)",)


def test_what_others_install_is_skipped_by_name_or_pattern():
    plan = make_plan(SET, environment(), skip=("beta", "g*"))
    assert [name for name, *_ in changes(plan)] == ["alpha-one", "delta", "epsilon"]
    assert plan.kept == 2
    assert make_plan(SET, environment(), skip=iter(["*"])).changes == ()
    plan = make_plan(SET, environment(), skip=("Beta", "G*", "EPSILON", "Alpha_One"))
    assert [name for name, *_ in changes(plan)] == ["delta"], "names are compared as indexes do, patterns too"


def test_two_ways_to_one_package_install_it_once():
    both = lock_set(["a", "b"], row("a", "1", "c>=1"), row("b", "1", "c>=2"), row("c", "2"))
    assert changes(make_plan(both, environment())) == [
        ("a", None, "1", "fastsd needs a"),
        ("b", None, "1", "fastsd needs b"),
        ("c", None, "2", "a needs c>=1"),
    ]


def test_a_circle_of_needs_ends():
    circle = lock_set(["a"], row("a", "1", "b"), row("b", "1", "a"))
    assert [name for name, *_ in changes(make_plan(circle, environment()))] == ["a", "b"]


def test_a_need_that_the_lock_lacks_is_named_with_who_needs_it():
    with pytest.raises(InstallError, match=r"\(little, Python 3\.13\) has no row for zeta, which a needs"):
        make_plan(lock_set(["a"], row("a", "1", "zeta>=2")), environment())
    with pytest.raises(InstallError, match="no row for zeta, which fastsd needs"):
        make_plan(lock_set(["zeta"]), environment())


def test_everything_that_only_the_platform_can_bring_is_named_at_once():
    heavy = lock_set(["a", "torch>=2.3"], row("a", "1", "numpy>=2", "nvidia-cublas-cu12"))
    with pytest.raises(InstallError, match=r"can provide: numpy 1\.26, nvidia-cublas-cu12, torch 1\.13 \(absent or"):
        make_plan(heavy, environment(torch="1.13", numpy="1.26"))
    found = make_plan(heavy, environment(torch="2.11.0+cu128", numpy="2.1", nvidia_cublas_cu12="12"))
    assert [name for name, *_ in changes(found)] == ["a"]


@pytest.mark.parametrize(
    ("wanted", "hint"),
    [
        (["numpy>=2"], "Run: pip install numpy; fastsd never"),
        (["torch>=2.3"], "Install PyTorch as its guide says (pytorch.org, Get started); fastsd never"),
        (["torch>=2.3", "numpy>=2", "ipywidgets"], "Get started), and run: pip install ipywidgets numpy; fastsd never"),
    ],
)
def test_the_way_to_bring_it_is_that_of_exactly_what_lacks(wanted, hint):
    with pytest.raises(InstallError) as caught:
        make_plan(lock_set(wanted), environment())
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    "name", ["torch", "Torch", "torchvision", "torchaudio", "numpy", "nvidia-cudnn-cu12", "nvidia_nccl", "triton",
             "cuda-python", "jax", "jaxlib", "ipywidgets", "ipykernel", "ipython", "google-colab",
             "widgetsnbextension"],
)  # fmt: skip
def test_the_platforms_own_is_known_by_name(name):
    assert is_protected(name)


@pytest.mark.parametrize(
    "name", ["torchsde", "numpydoc", "nvidia", "cuda", "diffusers", "ipython-genutils", "tritonclient"]
)
def test_what_only_looks_like_it_is_not(name):
    assert not is_protected(name)


def test_names_are_compared_as_indexes_do():
    assert matches("Pillow_HEIF", ["pillow-heif"])
    assert not matches("pillow", ["pillow-heif"])
    assert not matches("pillow", [])


def test_in_an_environment_of_its_own_every_version_is_the_locked_one():
    exact = lock_set([], row("a", "1.0", "zeta"), row("b", "2.0"), row("torch", "2.8.0"), own=True)
    plan = make_plan(exact, environment(a="1.0", b="2.0.1", torch="2.8.0+cpu"))
    assert changes(plan) == [("b", "2.0.1", "2.0", "2.0.1 is here")]
    assert plan.kept == 2
    plan = make_plan(exact, environment(), skip=["torch"])
    assert changes(plan) == [("a", None, "1.0", "missing"), ("b", None, "2.0", "missing")]


def test_any_build_of_a_library_serves_at_a_version_in_its_range():
    vision = lock_set(["opencv-python-headless>=4.9"], row("opencv-python-headless", "4.12"))
    assert make_plan(vision, environment(opencv_contrib_python="4.9")).changes == ()
    with pytest.raises(InstallError, match=r"opencv-contrib-python 4\.8 \(fastsd needs >=4\.9\)") as caught:
        make_plan(vision, environment(opencv_contrib_python="4.8"))  # a second build would overwrite it
    assert "'opencv-contrib-python>=4.9'" in caught.value.hint
    assert len(make_plan(vision, environment(opencv="4.9")).changes) == 1


def test_all_that_is_asked_for_by_name_is_enough():
    assert has_all(SET, environment(alpha_one="2", gamma="1"))
    assert not has_all(SET, environment(alpha_one="2"))
    assert has_all(SET, environment(alpha_one="3", gamma="1"))
    assert not has_all(SET, environment(alpha_one="0.9", gamma="1"))
    assert has_all(SET, environment(alpha_one="2"), skip=("gam*",))
    assert has_all(SET, environment(alpha_one="2"), skip=iter(["gamma"]))
    assert not has_all(lock_set([], row("a", "1"), own=True), environment(a="1"))


def test_the_copy_that_pip_carries_will_do_and_without_either_it_is_said(monkeypatch):
    pytest.importorskip("pip")
    monkeypatch.setitem(sys.modules, "packaging", None)
    assert changes(make_plan(SET, environment(alpha_one="1.0"))) == [("gamma", None, "0.3", "fastsd needs gamma>=0.1")]
    monkeypatch.setitem(sys.modules, "pip._vendor.packaging", None)
    with pytest.raises(DependencyMissing, match="Neither packaging nor pip is installed") as caught:
        make_plan(SET, environment())
    assert caught.value.hint == "Run: python -m ensurepip"
