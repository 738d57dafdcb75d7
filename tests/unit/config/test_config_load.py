"""What a right configuration becomes."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proctor.config.load import load_run
from proctor.config.names import slug
from proctor.config.numbers import human_int
from proctor.config.schema import dump_resolved
from proctor.config.spec import LmEvalTask, NativeTaskRef, OpenAIEngine, RunSpec, VllmServer

GOOD = "name: x\nmodels: {m: {path: ./m}}\ntasks: [{lm_eval: hellaswag}]\n"
Write = Callable[..., Path]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("100B", 100_000_000_000),
        ("2T", 2_000_000_000_000),
        ("1.5B", 1_500_000_000),
        ("2_097_152", 2_097_152),
        (" 10k ", 10_000),
        ("0.1K", 100),
        ("1.0005K", 1000),
        (7, 7),
        (1e9, 1_000_000_000),
        ("1e3", 1000),
    ],
)
def test_human_int(value: object, expected: int) -> None:
    assert human_int(value) == expected


@pytest.mark.parametrize(
    "value", ["", "B", "1.5", 1.5, True, None, "100X", "-1", -1, "1e400B", "inf", float("nan"), []]
)
def test_human_int_refuses(value: object) -> None:
    with pytest.raises(ValueError, match=r"whole number|negative"):
        human_int(value)


@given(st.integers(min_value=0, max_value=10**18))
def test_human_int_keeps_whole_numbers(number: int) -> None:
    assert human_int(f"{number:_}") == number == human_int(number)


def test_a_text_stands_for_a_list_of_one(write: Write) -> None:
    spec = load_run(write("name: x\nmodels: {m: {path: ./m}}\ntasks: [{lm_eval: a}, {native: b.yaml}]\n"))
    lm_eval, native = spec.tasks
    assert isinstance(lm_eval, LmEvalTask) and lm_eval.lm_eval == ("a",)
    assert isinstance(native, NativeTaskRef) and len(native.native) == 1


def test_yaml_takes_nothing_for_a_number_or_flag_that_is_text(write: Write) -> None:
    text = """
name: 2024-01-01
models:
  no: {path: ./m, revision: 0123456}
  1e3: {path: ./n, model_key: 7, display_name: yes}
tasks:
  - {lm_eval: [on], limit: 10:20, apply_chat_template: yes}
engine: {server: {type: vllm, env: {OMP_NUM_THREADS: 4, FLAG: true}}}
"""
    spec = load_run(write(text))
    assert spec.name == "2024-01-01"
    assert list(spec.models) == ["no", "1e3"]
    assert spec.models["no"].revision == "0123456"
    assert (spec.models["1e3"].model_key, spec.models["1e3"].display_name) == ("7", "yes")
    assert spec.tasks[0].limit == "10:20" and spec.tasks[0].apply_chat_template is True
    assert isinstance(spec.engine, OpenAIEngine) and isinstance(spec.engine.server, VllmServer)
    assert spec.engine.server.env == {"OMP_NUM_THREADS": "4", "FLAG": "true"}


def test_limits(write: Write) -> None:
    tasks = "\n".join(f"  - {{lm_eval: a, limit: {limit}}}" for limit in ("100", "0.25", "'::2'", "[3, 1]", "5.0"))
    spec = load_run(write(f"name: x\nmodels: {{m: {{path: ./m}}}}\ntasks:\n{tasks}\n"))
    assert [t.limit for t in spec.tasks] == [100, 0.25, "::2", (3, 1), 5]


def test_relative_paths_belong_to_the_file_that_states_them(write: Write, tmp_path: Path) -> None:
    write(
        "store: ./shared\nmodels: {base: {path: ./weights}}\n"
        "tasks: [{lm_eval: a, include_path: tasks, python: env/bin/py}]\n",
        "team/base.yaml",
    )
    (tmp_path / "team" / "near").mkdir()
    (tmp_path / "near").mkdir()
    spec = load_run(
        write(
            "extends: ../team/base.yaml\nname: x\nmodels:\n  a: {path: near, tokenizer: tok/}\n  b: {path: org/name}\n"
            "  c: {path: ~/m.gguf}\n  d: {path: 'embedded:smollm2-135m'}\n",
            "mine/run.yaml",
        )
    )
    assert spec.store == str(tmp_path / "team" / "shared")
    assert spec.runs == str(tmp_path / "mine" / "runs")
    assert spec.models["base"].path == str(tmp_path / "team" / "weights")
    assert spec.models["a"].path == "hub:near"  # there is no mine/near
    assert spec.models["a"].tokenizer == str(tmp_path / "mine" / "tok")
    assert spec.models["b"].path == "hub:org/name"
    assert spec.models["c"].path == os.path.expanduser("~/m.gguf")
    assert spec.models["d"].path == "embedded:smollm2-135m"
    task = spec.tasks[0]
    assert isinstance(task, LmEvalTask)
    assert task.include_path == (str(tmp_path / "team" / "tasks"),)
    assert task.python == str(tmp_path / "team" / "env" / "bin" / "py")


def test_an_existing_directory_wins_over_a_hub_id(write: Write, tmp_path: Path) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    text = (
        "name: x\nmodels: {a: {path: org/name}, b: {path: 'hub:org/name'}}\ntasks: [{native: ['t.yaml', 'demo:t']}]\n"
    )
    spec = load_run(write(text))
    assert [m.path for m in spec.models.values()] == [str(tmp_path / "org" / "name"), "hub:org/name"]
    assert isinstance(spec.tasks[0], NativeTaskRef)
    assert spec.tasks[0].native == (str(tmp_path / "t.yaml"), "demo:t")


def test_extends_merges_mappings_and_replaces_lists(write: Write) -> None:
    write("tasks: [{lm_eval: a}]\nengine: {retries: 1, server: {type: vllm, args: {x: 1, y: 1}}}\n", "one.yaml")
    write("engine: {retries: 2, server: {args: {y: 2}}}\n", "two.yaml")
    spec = load_run(
        write(
            "extends: [one.yaml, two.yaml]\nname: x\nmodels: {m: {path: ./m}}\n"
            "tasks: [{lm_eval: b}]\nengine: {server: {args: {z: 3}}}\n"
        )
    )
    engine = spec.engine
    assert isinstance(engine, OpenAIEngine) and isinstance(engine.server, VllmServer)
    assert engine.retries == 2 and engine.server.args == {"x": 1, "y": 2, "z": 3}
    assert [t.lm_eval for t in spec.tasks if isinstance(t, LmEvalTask)] == [("b",)]


def test_extends_another_type_drops_the_keys_of_the_first(write: Write) -> None:
    write("engine: {max_in_flight: 3, server: {type: llama.cpp, slots: 2}}\n", "base.yaml")
    assert load_run(write(GOOD + "extends: base.yaml\nengine: {type: fake}\n")).engine.type == "fake"
    kept = load_run(write(GOOD + "extends: base.yaml\nengine: {type: openai, server: {type: vllm}}\n")).engine
    assert isinstance(kept, OpenAIEngine) and kept.max_in_flight == 3 and kept.server == VllmServer()


def test_a_diamond_is_no_cycle(write: Write) -> None:
    write("engine: {retries: 7}\n", "root.yaml")
    write("extends: root.yaml\n", "left.yaml")
    write("extends: root.yaml\n", "right.yaml")
    engine = load_run(write(GOOD + "extends: [left.yaml, right.yaml]\n")).engine
    assert isinstance(engine, OpenAIEngine) and engine.retries == 7


def test_yaml_merge_keys(write: Write) -> None:
    text = (
        "name: x\nmodels:\n  a: &a {path: ./a, train_batch_size: 2}\n  b: {<<: *a, path: ./b}\ntasks: [{lm_eval: t}]\n"
    )
    spec = load_run(write(text))
    assert spec.models["b"].train_batch_size == 2 and spec.models["b"].path.endswith("/b")


def test_overrides(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    text = "name: x\nmodels: {llama-3.1: {path: ./m}, b: {path: ./b}}\ntasks: [{lm_eval: [a, b]}, {lm_eval: c}]\n"
    spec = load_run(
        write(text),
        [
            "engine.server.type=vllm",
            "engine.server.args={dtype: float32}",
            "tasks.1.limit=10:20",
            "tasks.-1.num_fewshot=[0, 5]",
            "tasks.0.lm_eval.1=z",
            "models.llama-3.1.tokens_trained=2T",
            'models."b".display_name=a=b',
            'models."k = v.1".path=./k',
            "store=./here",
            "models.new={path: ./n}",
        ],
    )
    assert isinstance(spec.engine, OpenAIEngine)
    assert spec.engine.server == VllmServer(args={"dtype": "float32"})
    assert spec.tasks[1].limit == "10:20" and spec.tasks[1].num_fewshot == (0, 5)
    assert isinstance(spec.tasks[0], LmEvalTask) and spec.tasks[0].lm_eval == ("a", "z")
    assert spec.models["llama-3.1"].tokens_trained == 2 * 10**12
    assert spec.models["b"].display_name == "a=b"
    assert spec.store == str(tmp_path / "elsewhere" / "here")
    assert spec.models["k = v.1"].path == str(tmp_path / "elsewhere" / "k")
    assert spec.models["new"].path == str(tmp_path / "elsewhere" / "n")


def test_hostile_names_and_paths(write: Write, tmp_path: Path, hostile_name: str) -> None:
    directory = tmp_path / hostile_name.replace("/", "_")
    directory.mkdir()
    inner = RunSpec.model_validate(
        {
            "name": hostile_name,
            "store": str(directory / "store"),
            "runs": str(directory / "runs"),
            "models": {hostile_name: {"path": str(directory / hostile_name), "display_name": hostile_name}},
            "tasks": [{"native": str(directory / "t.yaml")}],
        }
    )
    path = directory / "run.yaml"
    path.write_text(dump_resolved(inner), encoding="utf-8")
    assert load_run(path) == inner
    assert load_run(path, [f"name={hostile_name!r}"] if "'" not in hostile_name and "\n" not in hostile_name else [])


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), min_size=1).filter(str.strip)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)


@given(name=TEXT, model=TEXT, task=TEXT, arguments=st.dictionaries(TEXT, PLAIN, max_size=3))
def test_the_resolved_file_is_the_same_run(
    tmp_path_factory: pytest.TempPathFactory, name: str, model: str, task: str, arguments: dict[str, object]
) -> None:
    spec = RunSpec.model_validate(
        {
            "name": name,
            "store": "/s",
            "runs": "/r",
            "models": {
                model: {
                    "path": "hub:org/name",
                    "engine": {"server": {"type": "vllm"}},
                    "checkpoints": None,
                    "tokens_trained": "1.5B",
                }
            },
            "tasks": [{"lm_eval": ["a", task.removesuffix(".yaml").removesuffix(".yml") or "t"], "limit": 0.5}],
            "engine": {"server": {"type": "vllm", "args": arguments}},
        }
    )
    path = tmp_path_factory.mktemp("resolved") / "resolved.yaml"
    path.write_text(dump_resolved(spec), encoding="utf-8")
    assert load_run(path) == spec


@given(st.lists(st.text(), min_size=2, max_size=2, unique=True))
def test_slugs_of_different_texts_differ(texts: list[str]) -> None:
    slugs = [slug(text) for text in texts]
    assert slugs[0].casefold() != slugs[1].casefold()
    for text in slugs:
        assert 0 < len(text) <= 63 and set(text) <= set("abcdefghijklmnopqrstuvwxyz0123456789._-") and text[0] != "."


def test_slug_cannot_be_forged() -> None:
    assert slug("sweep") == "sweep"
    assert slug("My Sweep").startswith("my-sweep-")
    assert slug(slug("My Sweep")) != slug("My Sweep")
    assert len({slug(t) for t in ("a b", "a  b", "a\nb", "A b", "a-b", "ä b", "模型", "型模")}) == 8
