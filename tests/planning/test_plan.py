"""Plans: what fits where, from shapes; and against the compiled programs themselves."""

import dataclasses
import functools
import itertools
import json

import pytest

from jaxspec.cli import main
from jaxspec.config import TreeConfig
from jaxspec.drafters.block import BlockDrafter
from jaxspec.drafters.eagle import EagleDrafter
from jaxspec.drafters.joined import beside_lookup
from jaxspec.drafters.mtp import MtpDrafter, mtp_config
from jaxspec.drafters.plain import Plain
from jaxspec.models.presets import PRESETS
from jaxspec.planning import plan as planning
from jaxspec.planning.setup import Setup, published_drafter
from jaxspec.training.recipe import eagle_config
from pallas_kernels.h100.target import BYTES_PER_SECOND, MEMORY_BYTES
from tests.slow import slow_but

plan = functools.cache(planning.plan)  # many tests ask for the same


def setup(name, *, nodes=64, **options):
    target = PRESETS[name]
    tree = TreeConfig("best_first", size=nodes)
    return Setup(target, BlockDrafter(published_drafter(target), tree), **options)


def test_parts_of_qwen3_8b_on_one_device():
    parts = plan(setup("qwen3-8b", context=4096, batch=2), ()).parts
    assert parts["target weights"] == 2 * 8_190_735_360  # the card says 8.2 B parameters
    assert parts["target cache"] == 2 * 2 * 36 * 8 * 4096 * 128 * 2
    assert parts["drafter state"] == 2 * 2 * 5 * 8 * 4096 * 128 * 2
    assert parts["other state"] < 10**6


@pytest.mark.slow
def test_fp8_halves_all_but_vocabulary_and_norms():
    whole, fp8 = (plan(setup("qwen3-8b", fp8=kept), ()) for kept in (False, True))
    matrices = 36 * (4096 * 6144 + 4096 * 4096 + 3 * 4096 * 12_288)
    scales = 4 * matrices // 128**2
    saved = whole.parts["target weights"] - fp8.parts["target weights"]
    assert saved == matrices - scales
    assert fp8.floors["plain"] / whole.floors["plain"] == pytest.approx(0.559, abs=1e-3)
    assert fp8.parts["target cache"] == whole.parts["target cache"]
    head = plan(setup("qwen3-8b", fp8=True, fp8_lm_head=True), ())
    values, scales = 151_936 * 4096, 4 * 1187 * 32
    assert fp8.parts["target weights"] - head.parts["target weights"] == values - scales
    tied = plan(setup("qwen3-4b", fp8=True, fp8_lm_head=True), ()).parts["target weights"]
    apart = plan(setup("qwen3-4b", fp8=True), ()).parts["target weights"]
    assert tied - apart == 151_936 * 2560 + 4 * 1187 * 20  # beside the embedding
    with pytest.raises(ValueError, match="fp8_lm_head is set without fp8"):
        setup("qwen3-8b", fp8_lm_head=True)


def test_a_hybrid_keeps_keys_and_values_of_every_fourth_layer_and_a_state_of_the_others():
    found = plan(Setup(PRESETS["qwen3.5-9b"], Plain(), context=4096, batch=2), ())
    kv = 2 * 8 * 4 * 4096 * 256 * 2
    state, window = 24 * 32 * 128 * 128 * 4, 24 * 3 * 8192 * 4
    assert found.parts["target cache"] == 2 * (kv + state + window)
    longer = plan(Setup(PRESETS["qwen3.5-9b"], Plain(), context=8192, batch=2), ())
    assert longer.parts["target cache"] - found.parts["target cache"] == 2 * kv


@pytest.mark.parametrize("devices", [2, 4, 8, 16])
def test_a_hybrids_states_are_cut_by_head(devices):
    alone, cut = (
        plan(Setup(PRESETS["qwen3.5-9b"], Plain(), context=4096, devices=n), ()).parts
        for n in (1, devices)
    )
    kv, state = 2 * 8 * 4 * 4096 * 256 * 2, 24 * (32 * 128 * 128 + 3 * 8192) * 4
    assert alone["target cache"] == kv + state
    assert cut["target cache"] == kv // min(devices, 4) + state // devices


def test_the_vocabulary_that_a_drafter_shares_is_counted_once():
    with_drafter = plan(setup("qwen3-8b"), ())
    alone = plan(Setup(PRESETS["qwen3-8b"], Plain()), ())
    head = with_drafter.parts["drafter weights"] - with_drafter.repeated
    assert with_drafter.repeated == 2 * 2 * 151_936 * 4096
    added = head + with_drafter.parts["drafter state"]
    assert with_drafter.state - alone.state == pytest.approx(added, abs=100)


def test_eagle_reads_its_layer_and_the_head_once_per_step():
    target = PRESETS["qwen3-8b"]
    drafter = EagleDrafter(eagle_config(target), TreeConfig("chain", 8))
    found = plan(Setup(target, drafter, context=4096), ())
    wide, inner, vocabulary = 4096, 12_288, 151_936 * 4096
    layer = 2 * wide * (4096 + 2 * 1024) + 4096 * wide + 3 * wide * inner
    weights = 2 * (3 * wide * wide + layer + 4 * wide)
    assert found.parts["drafter weights"] - found.repeated == weights
    kept = 2 * 4096 * (2 * 8 * 128 + wide)  # keys, values and features
    assert found.parts["drafter state"] == kept
    read = 7 * (weights + 2 * vocabulary + 2 * 4096 * 2 * 8 * 128)
    assert found.floors["draft"] == pytest.approx(1e3 * read / BYTES_PER_SECOND)


def test_an_mtp_layer_reads_the_experts_that_a_token_chooses():
    target = PRESETS["qwen3.5-35b-a3b"]
    drafter = MtpDrafter(mtp_config(target), TreeConfig("chain", 8))
    found = plan(Setup(target, drafter, context=4096), ())
    wide, inner, vocabulary = 2048, 512, 248_320 * 2048
    attention = wide * 2 * (2 * 8 + 2) * 256 + 16 * 256 * wide
    experts, always = 8 * 3 * wide * inner, 3 * wide * inner + wide + 256 * wide
    layer = 2 * (2 * wide * wide + attention + experts + always) + 4 * (2 * wide + 2 * 256)
    read = 5 * (layer + 2 * vocabulary + 2 * 4096 * 2 * 2 * 256)
    assert found.floors["draft"] == pytest.approx(1e3 * read / BYTES_PER_SECOND)
    assert found.repeated == 2 * 2 * vocabulary


def test_prompt_lookup_joined_with_a_drafter_adds_no_weights():
    alone = setup("qwen3-8b")
    joined = dataclasses.replace(alone, drafter=beside_lookup(alone.drafter))
    one, both = plan(alone, ()), plan(joined, ())
    assert both.floors == one.floors and both.repeated == one.repeated > 0
    assert both.parts["drafter weights"] == one.parts["drafter weights"]
    assert one.state <= both.state < one.state + 10**6  # lookup keeps the row's tokens


def test_a_plain_step_reads_every_weight_but_the_embedding_and_the_cache():
    floors = plan(Setup(PRESETS["qwen3-8b"], Plain(), context=4096), ()).floors
    norms = 2 * 4096 * 2 * 36 + 2 * 2 * 128 * 36  # within rounding
    read = 2 * 8_190_735_360 - 2 * 151_936 * 4096 + 2 * 36 * 8 * 4096 * 128 * 2
    assert floors["plain"] == pytest.approx(1e3 * read / BYTES_PER_SECOND, rel=norms / read)
    assert floors["draft"] == 0 and floors["round"] == floors["verify"] == floors["plain"]


def test_a_plain_step_of_a_mixture_reads_the_chosen_experts_only():
    one, many = (
        plan(Setup(PRESETS["qwen3-30b-a3b"], Plain(), batch=batch, context=128), ()).floors
        for batch in (1, 16)
    )
    assert one["plain"] < 2.2  # ms: 3.0 B parameters of 30.5 B
    assert many["plain"] > 8 * one["plain"]  # 16 rows reach all 128 experts


def test_speedup_grows_with_tau_and_shrinks_with_the_drafter():
    drafted = plan(setup("qwen3-8b"), ())
    assert drafted.speedup(4) == 2 * drafted.speedup(2)
    assert 0.8 < drafted.speedup(1) < 1


@pytest.mark.parametrize("devices, fits", [(1, False), (2, False), (4, False), (8, True)])
def test_what_fits(devices, fits):
    found = plan(setup("qwen3-235b-a22b", devices=devices), ())
    assert found.fits == fits == (found.peak <= MEMORY_BYTES)
    assert (found.most_rows >= 1) == fits


def test_what_does_not_fit_is_not_compiled():
    assert plan(setup("qwen3-235b-a22b")).programs == {}  # nor is a compiler needed


def test_devices_share_all_but_what_is_small():
    whole, cut = (plan(setup("qwen3-32b", devices=n), ()) for n in (1, 8))
    assert cut.state == pytest.approx(whole.state / 8, rel=3e-2)  # fc is whole


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(context=1000), "context is 1000; expected a multiple of 128"),
        (dict(context=128 * 1000), "context is 128000; the target has 40960 positions"),
        (dict(batch=0), "batch is 0; expected at least 1"),
        (dict(devices=5), "12288 channels cannot be sharded evenly over 5 devices"),
    ],
)
def test_setups_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        setup("qwen3-8b", **options)


def test_command(capsys):
    options = ["--devices", "1", "8", "--no-compile", "--tau", "3"]
    assert main(["plan", "--target", "Qwen/Qwen3-235B-A22B", *options, "--json"]) == 1
    one, eight = map(json.loads, capsys.readouterr().out.splitlines())
    assert not one["fits"] and eight["fits"] and eight["programs"] == {}
    assert eight["peak"] == sum(eight["parts"].values()) - eight["repeated"]
    assert set(eight["speedup_at_best"]) == {"3.0"}
    assert main(["plan", "--target", "qwen3-8b", "--no-compile", "--drafter", "none"]) == 0
    assert "without temporaries, not compiled" in capsys.readouterr().out


def test_command_says_what_it_counts_twice(capsys):
    assert main(["plan", "--target", "qwen3-8b", "--no-compile"]) == 0
    assert "  embedding, LM head: counted twice " in capsys.readouterr().out


def test_command_with_a_name_nothing_is_known_of(capsys):
    assert main(["plan", "--target", "Qwen/Qwen9", "--no-compile"]) == 2
    assert "no preset and no folder is called Qwen/Qwen9" in capsys.readouterr().err
    assert main(["plan", "--target", "qwen3-8b", "--no-compile", "--drafter", "nonsense"]) == 2
    assert "there is no drafter 'nonsense'; expected shipped" in capsys.readouterr().err


@pytest.mark.real
def test_the_default_target_has_a_plan(smollm2_path, capsys):
    options = ["--drafter", "none", "--budget", "1", "--no-compile", "--json"]
    for name in ("smollm2-135m", str(smollm2_path)):
        assert main(["plan", "--target", name, *options]) == 0
        parts = json.loads(capsys.readouterr().out)["parts"]
        assert parts["target weights"] == 2 * 134_515_008


# A program leaves out scalars that it does not read; of the arrays it misses none.
UNREAD = 64


ROUNDS = list(itertools.product((x for x in PRESETS if "qwen3-" in x), (1, 2, 4, 8)))
FEW = [  # all of them: `make h100-rounds`
    ("qwen3-0.6b", 1),
    ("qwen3-0.6b", 8),
    ("qwen3-8b", 1),
    ("qwen3-30b-a3b", 8),
    ("qwen3-235b-a22b", 1),
]


@pytest.mark.h100
@pytest.mark.parametrize("name, devices", slow_but(FEW, ROUNDS, mark=pytest.mark.gate))
def test_figures_are_those_of_the_compiled_program(name, devices):
    context = 65_536 if name.endswith("2507") else 4096  # else the 2507 are the same again
    found = plan(setup(name, devices=devices, context=context), ("round",))
    if not found.programs:
        assert "235b" in name and devices < 8 and not found.fits
        return
    compiled = found.programs["round"]
    assert 0 <= sum(found.parts.values()) - compiled.arguments <= UNREAD
    state = sum(size for part, size in found.parts.items() if not part.endswith("weights"))
    assert 0 <= state - compiled.aliased <= 3000  # updated in place, all but the options
    assert found.peak == compiled.peak - found.repeated
    assert compiled.temporaries < 10**9 and found.fits


@pytest.mark.h100
def test_a_prompt_is_planned_too():
    found = plan(setup("qwen3-8b", context=32_768, batch=4), ("prefill",))
    compiled = found.programs["prefill"]
    caches = found.parts["target cache"] + found.parts["drafter state"]
    assert 0 <= compiled.outputs - caches < 10**7
    assert found.fits
    assert found.peak == max(found.state, compiled.peak - found.repeated)
