"""Compare the compiled kernel with the float64 reference on edge cases and random cases, and test how it is built."""

import functools
import itertools
import logging
import multiprocessing
import os
import re
import shutil
import time
from pathlib import Path
from unittest import mock

import attention_cases as cases
import pytest
import torch
from attention_cases import LAYOUTS, draw, outputs_and_grads
from marking import slow_but_for

from sasa_train.attention import cpu, dispatch, kernel_builds, local_attention


def needs_compiler() -> str | None:
    return cpu.why_not_built("local_attention", 3)


pytestmark = pytest.mark.skipif(needs_compiler() is not None, reason=f"no compiled kernel: {needs_compiler()}")
assert_equals_reference = functools.partial(cases.assert_equals_reference, backend="cpu")


@pytest.mark.parametrize("kernel_size", slow_but_for([1, 3, 7], range(1, 17, 2)))
def test_every_window_and_map(kernel_size):
    """Maps range from 1x1 to larger than a tile; some are smaller than the window."""
    for h, w in [(1, 1), (1, 7), (7, 1), (2, 3), (4, 4), (8, 8), (5, 19), (17, 9)]:
        assert_equals_reference((2, 3, h, w, 4), kernel_size)


@pytest.mark.slow
def test_a_large_odd_map():
    assert_equals_reference((1, 2, 33, 57, 6), 7)
    assert_equals_reference((1, 1, 57, 33, 8), 11, border="zero", layout="planar")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("head_dim", slow_but_for([4, 10, 16], [2, 4, 6, 8, 10, 16, 20, 32, 48, 64]))
def test_every_head_dim_and_layout(head_dim, layout):
    """Head dimensions are chosen so that loads and stores use full vectors, partial vectors, or both."""
    assert_equals_reference((3, 7, 5, 9, head_dim), 5, layout=layout)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("border", ["mask", "zero"])
def test_every_option(border, dtype):
    for content, rel in [(True, "shared"), (True, "per head"), (True, None), (False, "shared"), (False, "per head")]:
        assert_equals_reference((2, 5, 6, 7, 8), 3, dtype, "fused channels_last", border, content, rel)


def test_odd_head_dims_without_embeddings():
    for head_dim in (1, 3, 7, 17):
        assert_equals_reference((2, 3, 5, 4, head_dim), 3, rel=None)


def test_the_pool_of_a_stage_begin():
    """Check odd sizes (the last averages cover one or two positions), several tiles, and rows shared by threads."""
    for h, w in [(1, 1), (1, 7), (8, 1), (5, 8), (8, 5), (20, 35), (33, 14)]:
        for kernel_size in (1, 3, 7):
            assert_equals_reference((2, 5, h, w, 6), kernel_size, border="zero" if h == 8 else "mask", stride=2)
    assert_equals_reference((1, 1, 41, 57, 16), 7, layout="fused channels_last", stride=2)


@pytest.mark.slow
def test_cases_drawn_at_random():
    dtypes, rels = (torch.float32, torch.bfloat16), ("shared", "per head", None)
    cases.assert_random_cases(60, (3, 9, 19, 35, 12), dtypes, rels, strides=(1, 1, 2), backend="cpu")


@pytest.mark.parametrize("library", [("local_attention", 3), ("local_attention_any", 0)])
def test_huge_scores_stay_finite_and_a_nan_is_not_swallowed(monkeypatch, library):
    monkeypatch.setattr(cpu, "library_for", lambda *_: library)
    assert cases.assert_extremes_are_kept("cpu") == 9


def test_what_scratch_held_before_does_not_matter():
    """Scratch memory is reused between calls and cleared only where zeros are needed; here it is full of NaNs."""
    for border, shape in itertools.product(("mask", "zero"), [(2, 9, 5, 35, 6), (1, 3, 11, 4, 8), (1, 1, 1, 1, 2)]):
        local_attention(*draw(shape, "planar", torch.float32, torch.Generator()), kernel_size=7, backend="cpu")
        cpu._kept.scratch.fill_(255)
        assert_equals_reference(shape, 7, border=border)


@pytest.mark.parametrize("rel", ["mixed", "swapped"])
def test_one_embedding_shared_and_one_a_head(rel):
    for seed in range(5):
        assert_equals_reference((2, 3, 4, 5, 4), 3, rel=rel, seed=seed)


@pytest.mark.parametrize("shape", [(1, 1, 40, 9, 8), (5, 7, 19, 5, 4)])
def test_the_number_of_threads_changes_no_bit(shape):
    """Check cases with few planes, in which the rows are divided among threads and each computes its own halo rows."""
    generator = torch.Generator().manual_seed(0)
    rel = [torch.randn(7, shape[-1] // 2, generator=generator) for _ in range(2)]
    case = [*draw(shape, "channels_last", torch.float32, generator), *rel]
    cases.assert_threads_change_no_bit(
        lambda: outputs_and_grads("cpu", None, case, 7, True, "mask", torch.ones(shape)), (1, 2, 3, 5, 16)
    )


def test_outputs_and_gradients_keep_the_inputs_order_of_strides():
    """A channels_last projection gives channels_last output, so the layer's pool and permute need no copies."""
    q, key, v = draw((2, 3, 4, 5, 8), "fused channels_last", torch.float32, torch.Generator().manual_seed(0))
    inputs = [x.requires_grad_() for x in (q, key, v)]
    out = local_attention(*inputs, kernel_size=3, backend="cpu")
    for x in (out, *torch.autograd.grad(out.sum(), inputs)):
        assert x.permute(0, 2, 3, 1, 4).is_contiguous()


@pytest.mark.parametrize("capability", slow_but_for(["avx2"], ["avx2", "default"]))
def test_narrower_instruction_sets(capability):
    cases.run_narrower(
        capability,
        "import torch\n"
        "from attention_cases import LAYOUTS, assert_equals_reference\n"
        "for layout in LAYOUTS:\n"
        "    for d in (2, 4, 8, 18, 32):\n"
        "        assert_equals_reference((2, 5, 7, 9, d), 7, layout=layout, backend='cpu')\n"
        "case = ((2, 3, 17, 19, 8), 7, torch.bfloat16)\n"
        "assert_equals_reference(*case, border='zero', rel='per head', backend='cpu')\n",
    )


def test_float64_is_refused_by_name():
    q = torch.zeros(1, 1, 3, 3, 2, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="backend='cpu' cannot run: the tensors are torch.float64"):
        local_attention(q, q, q, kernel_size=3, backend="cpu")
    assert local_attention(q, q, q, kernel_size=3).shape == q.shape  # auto: the reference


@pytest.mark.parametrize("source", ["local_attention", "local_attention_any", "attention_stem"])
def test_a_changed_header_is_a_library_of_its_own(source):
    """A header that the name of a library does not depend on would leave a stale library in the cache."""
    texts = [(kernel_builds.SOURCES / name).read_text() for name in (f"{source}.cpp", *kernel_builds.HEADERS)]
    assert set(re.findall('#include "(.+)"', "".join(texts))) <= set(kernel_builds.HEADERS)


@pytest.fixture
def fresh_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SASA_TRAIN_CACHE", str(tmp_path))
    monkeypatch.setattr(
        kernel_builds, "FLAGS", tuple(flag for flag in kernel_builds.FLAGS if flag != "-O3")
    )  # compiles in a third of the time
    cpu._library.cache_clear()
    kernel_builds.version_of.cache_clear()
    dispatch._say_once.cache_clear()
    yield tmp_path
    cpu._library.cache_clear()
    kernel_builds.version_of.cache_clear()
    dispatch._say_once.cache_clear()


def test_without_a_compiler_auto_says_once_and_cpu_is_an_error(fresh_cache, monkeypatch, caplog):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    q = torch.randn(1, 1, 3, 3, 2)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            local_attention(q, q, q, kernel_size=3)
    assert [record.message for record in caplog.records if "install g++" in record.message] == [
        "local_attention: backend=auto runs the reference, many times slower than a compiled kernel, "
        "because no C++ compiler found (install g++, or name one in $CXX)"
    ]
    with pytest.raises(RuntimeError, match="no C\\+\\+ compiler found"):
        local_attention(q, q, q, kernel_size=3, backend="cpu")


def test_a_compiler_that_fails_is_quoted(fresh_cache, monkeypatch):
    monkeypatch.setenv("CXX", "false")
    q = torch.randn(1, 1, 3, 3, 2)
    with pytest.raises(RuntimeError, match="false could not build it"):
        local_attention(q, q, q, kernel_size=3, backend="cpu")


@pytest.mark.parametrize("does", ["exec sleep 60", "cat > /dev/null; exit 1"])
def test_a_compiler_that_waits_is_not_waited_for(fresh_cache, monkeypatch, does):
    """A wrapper that never answers, or reads the terminal, made each command hang at its first attention layer."""
    compiler = fresh_cache / "waiting"
    compiler.write_text(f"#!/bin/sh\n{does}\n")
    compiler.chmod(0o700)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setattr(kernel_builds, "VERSION_SECONDS", 1)
    start = time.monotonic()
    assert f"{compiler} could not build it: Command" in (cpu.why_not_built("local_attention", 3) or "")
    assert time.monotonic() - start < 30


def test_a_compiler_that_hides_our_functions_is_named_and_its_library_not_kept(fresh_cache, monkeypatch):
    compiler = fresh_cache / "hiding"
    compiler.write_text('#!/bin/sh\nexec g++ "$@" -fvisibility=hidden\n')
    compiler.chmod(0o700)
    monkeypatch.setenv("CXX", str(compiler))
    assert f"{compiler} built a library without our functions" in (cpu.why_not_built("local_attention", 3) or "")
    assert list(fresh_cache.iterdir()) == [compiler]


def test_the_library_is_kept_and_a_damaged_one_is_built_again(fresh_cache, monkeypatch):
    q = torch.randn(1, 1, 3, 3, 2)
    local_attention(q, q, q, kernel_size=1, backend="cpu")
    (library,) = fresh_cache.iterdir()
    built = library.read_bytes()
    cpu._library.cache_clear()
    local_attention(q, q, q, kernel_size=1, backend="cpu")
    assert list(fresh_cache.iterdir()) == [library]
    damaged = bytearray(built)
    damaged[len(damaged) // 2] ^= 1
    library.unlink()  # the loaded library stays in memory
    library.write_bytes(damaged)
    cpu._library.cache_clear()
    local_attention(q, q, q, kernel_size=1, backend="cpu")
    (rebuilt,) = fresh_cache.iterdir()
    assert rebuilt.stem.endswith(kernel_builds.digest(rebuilt.read_bytes()))


def _attend_in_a_process(_) -> float:
    q = torch.ones(1, 1, 3, 3, 2)
    return float(local_attention(q, q, q, kernel_size=1, backend="cpu").sum())


def test_folders_that_are_made_for_the_cache_are_private_whatever_the_umask(tmp_path, monkeypatch):
    """With parents=True, Python made ~/.cache writable for the group or for all."""
    monkeypatch.delenv("SASA_TRAIN_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home/.cache"))
    before = os.umask(0)
    try:
        folder = cpu._cache_folder()
    finally:
        os.umask(before)
    made = [folder, folder.parent, folder.parent.parent]
    assert folder == tmp_path / "home/.cache/sasa_train"
    assert [path.stat().st_mode & 0o777 for path in made] == [0o700] * 3


@pytest.mark.slow
@pytest.mark.parametrize("open_to", ["the folder", "the file"])
def test_a_cache_that_others_may_write_to_is_not_loaded(fresh_cache, monkeypatch, caplog, open_to):
    """Somebody else could have put a library there under the right name; umask 0 must not make it so."""
    before = os.umask(0)
    try:
        assert cpu.why_not_built("local_attention", 3) is None
    finally:
        os.umask(before)
    (library,) = fresh_cache.iterdir()
    assert library.stat().st_mode & 0o777 == 0o700
    (fresh_cache if open_to == "the folder" else library).chmod(0o777)
    loaded = []
    monkeypatch.setattr(cpu, "_load", loaded.append)
    cpu._library.cache_clear()
    assert cpu.why_not_built("local_attention", 3) is None
    (path,) = loaded
    if open_to == "the folder":
        assert path.parent != fresh_cache and path.parent.stat().st_mode & 0o777 == 0o700
        assert f"{fresh_cache} cannot be used: it belongs to somebody else, or others may write to it" in caplog.text
    else:
        assert path.parent == fresh_cache and path.stat().st_mode & 0o777 == 0o700


@pytest.fixture
def wheel(fresh_cache, monkeypatch, tmp_path_factory) -> Path:
    """Return the folder of an installed wheel's libraries; there is one, for windows of 1 x 1."""
    folder = tmp_path_factory.mktemp("site") / "prebuilt"
    monkeypatch.setattr(kernel_builds, "PREBUILT", folder)
    library = kernel_builds.Library("local_attention", 1, cpu._instruction_set())
    kernel_builds.build_prebuilt(folder, kernel_builds.find_compiler(), [library])
    monkeypatch.delenv("CXX", raising=False)
    return folder


def attend() -> tuple[str, list[torch.Tensor]]:
    """Return what a new process would name as the library for windows of 1 x 1, and its output and gradients."""
    cpu._library.cache_clear()
    torch.manual_seed(0)
    query, key, value = (x.requires_grad_() for x in torch.randn(3, 2, 3, 7, 5, 4).unbind())
    output = local_attention(query, key, value, kernel_size=1, backend="cpu")
    return cpu.describe_build("local_attention", 1), [output, *torch.autograd.grad(output.square().sum(), (key, value))]


def test_the_wheels_library_needs_no_compiler_and_has_the_bits_of_one_built_here(wheel, fresh_cache, monkeypatch):
    (library,) = wheel.glob("*.so")
    assert b"libgomp" not in library.read_bytes(), "it would load an OpenMP beside that of torch"
    compiler = kernel_builds.find_compiler()
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "which", lambda name: None)
        named, results = attend()
        assert ", prebuilt, " in named and not list(fresh_cache.iterdir())
        assert "no C++ compiler found" in cpu.why_not_built("attention_stem", 3)
    monkeypatch.setenv("CXX", compiler)  # asks for a library that is built here
    named_here, results_here = attend()
    assert named_here == named.replace("prebuilt, ", "")
    assert all(map(torch.equal, results, results_here))
    (built,) = fresh_cache.iterdir()
    assert built.name == library.name and built.read_bytes() == library.read_bytes()


def test_a_library_of_the_wheel_that_does_not_fit_is_not_loaded(wheel, tmp_path_factory, monkeypatch, caplog):
    """Edited sources are compiled here, whatever came with the wheel."""
    monkeypatch.setattr(shutil, "which", lambda name: None)
    (library,) = wheel.glob("*.so")
    edited = tmp_path_factory.mktemp("edited") / "csrc"
    shutil.copytree(kernel_builds.SOURCES, edited)
    with (edited / "vectors.h").open("a") as file:
        file.write("// edited\n")
    other = "avx2" if cpu._instruction_set() == "baseline" else "baseline"
    for where, name, value in (
        (kernel_builds, "SOURCES", edited),
        (kernel_builds, "FLAGS", (*kernel_builds.FLAGS, "-O1")),
        (cpu, "_instruction_set", lambda: other),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(where, name, value)
            assert "no C++ compiler found" in (cpu.why_not_built("local_attention", 1) or ""), name
        cpu._library.cache_clear()
    assert cpu.why_not_built("local_attention", 1) is None and not caplog.records
    library.write_bytes(library.read_bytes()[:-1])
    cpu._library.cache_clear()
    assert "no C++ compiler found" in (cpu.why_not_built("local_attention", 1) or "")
    assert f"{library} cannot be used, so that one is built: it is damaged" in caplog.text


@pytest.mark.parametrize(
    "needed,platform",
    [
        ("libc.so.6 libm.so.6 GLIBC_2.2.5 GLIBC_2.14", "manylinux_2_17_x86_64"),
        ("libstdc++.so.6 libc.so.6 GLIBC_2.14 GLIBC_2.34", "manylinux_2_34_x86_64"),
        ("libgomp.so.1 libc.so.6 GLIBC_2.14 GOMP_4.0", "linux_x86_64"),
        ("libstdc++.so.6 libc.so.6 GLIBC_2.14 GLIBCXX_3.4.30", "linux_x86_64"),
        ("libc.so.6 GLIBC_2.14 GLIBC_ABI_DT_RELR", "linux_x86_64"),
        ("libc.musl-x86_64.so.1", "linux_x86_64"),
    ],
)
def test_the_wheels_tag_names_the_oldest_system_on_which_its_libraries_load(tmp_path, needed, platform):
    """pip would install a wheel with a tag that is too old, and each process would then build its own kernels."""
    (tmp_path / "a.so").write_bytes("\0".join(["\x7fELF", "memcpy", *needed.split(), "sasa_forward", ""]).encode())
    assert kernel_builds.wheel_platform(tmp_path) == platform


@pytest.fixture
def loaded(fresh_cache, monkeypatch) -> list[Path]:
    """The libraries that are loaded, from a compiler that writes one line and a loader that only lists them."""
    compiler = fresh_cache.with_name("quick-c++")
    compiler.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && exec echo quick 1\nwhile [ "$1" != -o ]; do shift; done\necho it >"$2"\n'
    )
    compiler.chmod(0o700)
    monkeypatch.setenv("CXX", str(compiler))
    paths: list[Path] = []
    monkeypatch.setattr(cpu, "_load", paths.append)
    return paths


def build_and_load(loaded: list[Path]) -> Path:
    """Return the path of the library that a new process would load."""
    cpu._library.cache_clear()
    assert cpu.why_not_built("local_attention", 3) is None
    return loaded.pop()


@pytest.mark.parametrize("name", [".", "kernels"])
def test_a_relative_cache_folder_is_this_one(loaded, fresh_cache, monkeypatch, caplog, name):
    """dlopen would search LD_LIBRARY_PATH for a name without a slash, and load what nobody checked."""
    monkeypatch.chdir(fresh_cache)
    monkeypatch.setenv("SASA_TRAIN_CACHE", name)
    library = build_and_load(loaded)
    assert library.is_absolute() and library.parent == fresh_cache / name
    assert not caplog.records


def test_a_shared_folder_behind_a_link_keeps_its_mode(loaded, fresh_cache, monkeypatch, caplog):
    """A group's folder must not become private to the one who linked to it, nor be loaded from."""
    monkeypatch.delenv("SASA_TRAIN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(fresh_cache))
    shared, link = fresh_cache / "shared", fresh_cache / "sasa_train"
    shared.mkdir()
    shared.chmod(0o775)
    link.symlink_to(shared)
    assert fresh_cache not in build_and_load(loaded).parents
    assert shared.stat().st_mode & 0o777 == 0o775 and not list(shared.iterdir())
    assert f"{link} cannot be used: it is a symbolic link ($SASA_TRAIN_CACHE can name its target)" in caplog.text
    link.unlink()
    assert build_and_load(loaded).parent == link and link.stat().st_mode & 0o777 == 0o700


@pytest.mark.timeout(20)  # reading a pipe would take forever
@pytest.mark.parametrize("what", ["a pipe", "a terabyte", "a link"])
def test_what_is_no_library_is_replaced(loaded, caplog, what):
    library = build_and_load(loaded)
    other = library.with_name(library.name.replace(".so", "0.so"))
    library.rename(other)
    if what == "a link":
        library.symlink_to(other)
    elif what == "a pipe":
        os.mkfifo(library, 0o600)
    else:
        library.touch(mode=0o600)
        os.truncate(library, 1 << 40)
    assert build_and_load(loaded) == library
    assert not library.is_symlink() and library.read_text() == "it\n"
    assert list(library.parent.glob("*.so")) == [library] and not caplog.records


def test_a_folder_in_the_place_of_a_library_is_no_failed_build(loaded, caplog):
    """It used to be taken as one, so that the library was built in silence with another OpenMP."""
    library = build_and_load(loaded)
    library.unlink()
    library.mkdir()
    elsewhere = build_and_load(loaded)
    assert elsewhere.name == library.name and elsewhere.parent != library.parent
    assert "built for this process alone" in caplog.text and str(library) in caplog.text
    assert [path.name for path in library.parent.iterdir()] == [library.name]


def test_without_a_home_a_kernel_is_built_for_this_process(loaded, monkeypatch, caplog):
    """As in a container that runs with a user ID that has no name."""
    monkeypatch.delenv("SASA_TRAIN_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "expanduser", mock.Mock(side_effect=RuntimeError("Could not determine home directory.")))
    assert cpu.why_not_built("local_attention", 3) is None
    assert (
        "built for this process alone, because ~/.cache/sasa_train cannot be used: Could not determine" in caplog.text
    )


def test_what_a_killed_build_left_is_swept_up(loaded, fresh_cache):
    old = 10 * kernel_builds.BUILD_SECONDS
    left = [f"{name}-{'0' * 16}-it.tmp" for name in ("local_attention_any", "attention_stem")]
    for name, age in ((left[0], old), (left[1], 0), ("notes.tmp", old)):
        (fresh_cache / name).write_bytes(b"")
        os.utime(fresh_cache / name, (time.time() - age,) * 2)
    assert cpu.why_not_built("local_attention", 3) is None
    assert {p.name for p in fresh_cache.glob("*.tmp")} == {left[1], "notes.tmp"}  # the latter is the user's own
    assert len(list(fresh_cache.glob("*.so"))) == 1


def test_processes_that_build_at_once_do_no_harm(fresh_cache, tmp_path_factory, monkeypatch):
    compiler = tmp_path_factory.mktemp("compiler") / "quick"  # `fresh_cache` changes no flags of other processes
    compiler.write_text(f'#!/bin/sh\nexec {os.environ.get("CXX", "g++")} "$@" -O0\n')
    compiler.chmod(0o700)
    monkeypatch.setenv("CXX", str(compiler))
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        assert pool.map(_attend_in_a_process, range(2), chunksize=1) == [18.0, 18.0]
    libraries = list(fresh_cache.iterdir())  # one or two, both valid, and no temporary files
    assert libraries
    assert all(path.stem.endswith(kernel_builds.digest(path.read_bytes())) for path in libraries)


class _Attending(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        q = torch.full((2, 3, 5, 7, 4), float(index))
        return local_attention(q, q, q, kernel_size=3, backend="cpu")


def test_loader_workers_forked_after_a_parallel_call_go_on():
    """Starting a second OpenMP pool, or using the existing pool in a forked child, would hang here."""
    q = torch.randn(4, 8, 9, 9, 8)
    local_attention(q, q, q, kernel_size=3, backend="cpu")
    loader = torch.utils.data.DataLoader(_Attending(), num_workers=2, multiprocessing_context="fork", timeout=60)
    assert [float(batch.mean()) for batch in loader] == pytest.approx([0.0, 1.0, 2.0, 3.0])
    assert float((torch.ones(512, 512) @ torch.ones(512, 512)).sum()) == 512**3
