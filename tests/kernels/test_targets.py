"""The checked-in table of what kernels need is of these sources; kernels compile without spilling."""

from __future__ import annotations

import ast
import inspect
import json
from typing import Any

import pytest

from seqpar.kernels.targets import TARGETS, Variant, every_variant, fingerprint
from tests.kernels.compiled import ROOT, compiled_apart

TABLE = json.loads((ROOT / "docs" / "results" / "kernels.json").read_text())["kernels"]
VARIANTS = every_variant()

LONG = ("attention/attention_kernel/", "sparse/sparse_kernel/")
"""Two seconds each to compile, made of what `decode_kernel` is made of: those are left to the slow tests."""

CODE = """
import json, sys
from seqpar.kernels.targets import compiled, every_variant, resources
variants = every_variant()
print(json.dumps({{name: list(resources(compiled(variants[name], {target!r}))) for name in {names!r}}}))
"""


def one_of_each() -> list[str]:
    """The first configuration of every kernel."""
    first: dict[str, str] = {}
    for name in VARIANTS:
        first.setdefault(name.rsplit("/", 1)[0], name)
    return list(first.values())


def test_the_table_is_of_these_sources() -> None:
    now = {name: fingerprint(variant) for name, variant in VARIANTS.items()}
    stale = [name for name in now.keys() | TABLE.keys() if now.get(name) != TABLE.get(name, {}).get("source")]
    assert not stale, f"`make kernels` and commit what it writes: {sorted(stale)}"
    page = (ROOT / "docs" / "results" / "kernels.md").read_text()
    assert all(f"## {name.rsplit('/', 1)[0]}\n" in page for name in VARIANTS)


def test_nothing_in_the_table_spills_or_fails() -> None:
    for name, variant in VARIANTS.items():
        needed = TABLE[name]["targets"]
        assert set(needed) == set(variant.targets), name
        for target, need in needed.items():
            assert not isinstance(need, str), (name, target, need)
            registers, spilled, shared = need
            assert 0 < registers <= (512 if target == "gfx942" else 255) and spilled == 0, (name, target, need)
            assert shared <= TARGETS[target].shared_bytes, (name, target, need)


def compiles(names: list[str], target: str) -> None:
    found = compiled_apart(CODE.format(target=target, names=names))
    assert found.keys() == set(names)
    for name, (registers, spilled, shared) in found.items():
        assert registers > 0 and spilled == 0 and shared <= TARGETS[target].shared_bytes, (name, registers, spilled)


def test_every_kernel_compiles_for_an_h100() -> None:
    compiles([name for name in one_of_each() if not name.startswith(LONG)], "sm_90")


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_compiles(target: str) -> None:
    compiles([name for name in one_of_each() if target in VARIANTS[name].targets], target)


def changed(**how: Any) -> bool:
    variant = next(iter(VARIANTS.values()))
    return fingerprint(variant) != fingerprint(variant._replace(**how))


def test_fingerprints_are_of_source_and_launch() -> None:
    variant = next(iter(VARIANTS.values()))
    constant = next(iter(variant.constexprs))
    assert not changed(name="another", targets=("sm_90",))
    assert changed(num_warps=variant.num_warps * 2) and changed(num_stages=9) and changed(options={"maxnreg": 32})
    assert changed(constexprs={**variant.constexprs, constant: 12345})
    assert changed(signature={**variant.signature, next(iter(variant.signature)): "*fp8"})


def test_fingerprints_see_what_a_kernel_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    from seqpar.kernels.rotary import triton

    (variant,) = [each for each in VARIANTS.values() if each.name == "bf16-32x128"]
    before, source = fingerprint(variant), inspect.getsource

    def edited(of: str, text: str) -> Any:
        return lambda fn: source(fn).replace("tl.float32", text) if fn.__name__ == of else source(fn)

    monkeypatch.setattr(inspect, "getsource", edited("turned_halves", "tl.float64"))
    assert fingerprint(variant) != before
    monkeypatch.setattr(inspect, "getsource", lambda fn: source(fn).replace('"""Pairs', '"""Some pairs'))
    assert fingerprint(variant) == before and ast.parse(source(triton))


def test_an_unknown_target_is_refused() -> None:
    from seqpar.kernels.targets import compiled

    variant: Variant = next(iter(VARIANTS.values()))
    with pytest.raises(ValueError, match="`target` must be one of sm_80, sm_90, sm_100, gfx942, got 'sm_1'"):
        compiled(variant, "sm_1")
