"""Every wrong configuration gives one ConfigError that says where, what, and what would be right."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from proctor.config.load import load_run
from proctor.errors import ConfigError

HEAD = "name: x\nmodels: {m: {path: ./m}}\n"
TASKS = "tasks: [{lm_eval: hellaswag}]\n"
GOOD = HEAD + TASKS

# name: (text, what the message must contain, what it must not contain)
FAULTS: dict[str, tuple[str, list[str], list[str]]] = {
    "unknown key at the top": (GOOD + "engin: {}\n", ["run.yaml:4: engin: unknown key 'engin'", "'engine'"], []),
    "misspelt extends": (GOOD + "extend: a.yaml\n", ["did you mean 'extends'"], []),
    "unknown key in a model": (
        "name: x\nmodels:\n  m:\n    pth: ./m\n" + TASKS,
        ["run.yaml:4: models.m.pth: unknown key 'pth'; did you mean 'path'", "models.m.path: this key is required"],
        [],
    ),
    "unknown key in checkpoints": (
        "name: x\nmodels:\n  m: {path: ./m, checkpoints: {patern: 'c_{step}'}}\n" + TASKS,
        ["models.m.checkpoints.patern: unknown key 'patern'; did you mean 'pattern'"],
        [],
    ),
    "unknown key in an lm-eval task": (
        HEAD + "tasks:\n  - lm_eval: a\n    num_fewshots: 5\n",
        ["run.yaml:5: tasks.0.num_fewshots: unknown key 'num_fewshots' for lm_eval; did you mean 'num_fewshot'"],
        ["native"],
    ),
    "unknown key in a native task": (
        HEAD + "tasks: [{native: a.yaml, limits: 3}]\n",
        ["tasks.0.limits: unknown key 'limits' for native; did you mean 'limit'"],
        ["lm_eval"],
    ),
    "key of the other task source": (
        HEAD + "tasks: [{native: a.yaml, bootstrap_iters: 3}]\n",
        ["unknown key 'bootstrap_iters' for native (it belongs to lm_eval)"],
        [],
    ),
    "misspelt task source": (HEAD + "tasks: [{lm_evall: a}]\n", ["tasks.0: unknown key 'lm_evall'", "'lm_eval'"], []),
    "task without source": (HEAD + "tasks: [{limit: 3}]\n", ["tasks.0: needs `lm_eval:` or `native:`", "'limit'"], []),
    "task of two sources": (
        HEAD + "tasks: [{lm_eval: a, native: b.yaml}]\n",
        ["tasks.0: has `lm_eval:` and `native:`"],
        [],
    ),
    "task that is a text": (HEAD + "tasks: [hellaswag]\n", ["tasks.0: expected a mapping", "'hellaswag'"], []),
    "unknown key in openai": (
        GOOD + "engine: {type: openai, max_inflight: 3}\n",
        ["engine.max_inflight: unknown key 'max_inflight' for type: openai; did you mean 'max_in_flight'"],
        [],
    ),
    "unknown key without type": (GOOD + "engine: {retrys: 3}\n", ["engine.retrys", "did you mean 'retries'"], ["fake"]),
    "unknown key in lm_eval engine": (
        GOOD + "engine: {type: lm_eval, modle: hf}\n",
        ["engine.modle: unknown key 'modle' for type: lm_eval; did you mean 'model'"],
        ["openai"],
    ),
    "key of another engine": (
        GOOD + "engine: {type: lm_eval, server: {type: vllm}}\n",
        ["engine.server: unknown key 'server' for type: lm_eval (it belongs to openai)"],
        [],
    ),
    "unknown engine": (
        GOOD + "engine: {type: openia}\n",
        ["engine: type: unknown value 'openia'; did you mean 'openai'?", "lm_eval, fake"],
        [],
    ),
    "unknown key in vllm": (
        GOOD + "engine:\n  server:\n    type: vllm\n    replica: 2\n",
        ["run.yaml:7: engine.server.replica: unknown key 'replica' for type: vllm; did you mean 'replicas'"],
        ["llama", "sglang"],
    ),
    "unknown key in llama.cpp": (
        GOOD + "engine: {server: {type: llama.cpp, slot: 2}}\n",
        ["engine.server.slot: unknown key 'slot' for type: llama.cpp; did you mean 'slots'"],
        [],
    ),
    "unknown key in sglang": (GOOD + "engine: {server: {type: sglang, arg: {}}}\n", ["did you mean 'args'"], []),
    "unknown key in command": (
        GOOD + "engine: {server: {type: command, argv: [a], helth: /h}}\n",
        ["engine.server.helth", "did you mean 'health'"],
        [],
    ),
    "unknown key in endpoint": (
        GOOD + "engine: {server: {type: endpoint, healt: /h}}\n",
        ["did you mean 'health'"],
        [],
    ),
    "unknown server": (
        GOOD + "engine: {server: {type: vlm}}\n",
        ["engine.server: type: unknown value 'vlm'", "vllm"],
        [],
    ),
    "server without type": (GOOD + "engine: {server: {replicas: 2}}\n", ["engine.server: `type:` is missing"], []),
    "unknown key in launch": (GOOD + "launch: {worker: 2}\n", ["launch.worker: unknown key 'worker'", "'workers'"], []),
    "unknown key in a model's engine": (
        "name: x\nmodels:\n  m:\n    path: ./m\n    engine: {server: {type: vllm, env: {}, agrs: {}}}\n" + TASKS,
        ["run.yaml:5: models.m.engine.server.agrs: unknown key 'agrs' for type: vllm; did you mean 'args'"],
        [],
    ),
    "unknown key in a model's launch": (
        "name: x\nmodels: {m: {path: ./m, launch: {gpu: [0]}}}\n" + TASKS,
        ["models.m.launch.gpu: unknown key 'gpu'", "'gpus'"],
        [],
    ),
    "number out of range": (GOOD + "engine: {max_in_flight: 0}\n", ["engine.max_in_flight: must be ≥ 1, not '0'"], []),
    "true is no number": (GOOD + "engine: {retries: true}\n", ["engine.retries", "not true or false"], []),
    "text for a number": (
        GOOD + "engine: {retries: many}\n",
        ["engine.retries: expected a whole number", "'many'"],
        [],
    ),
    "number for a flag": (
        HEAD + "tasks: [{lm_eval: a, confirm_unsafe_code: 7}]\n",
        ["tasks.0.confirm_unsafe_code: expected true or false, not '7'"],
        [],
    ),
    "unknown choice": (
        GOOD + "profile: reproducable\n",
        ["profile: unknown value", "did you mean 'reproducible'?"],
        [],
    ),
    "list for a text": (GOOD + "store: [a]\n", ["store: expected text, not a list"], []),
    "text for a mapping": (GOOD + "engine: {server: {type: vllm, args: fast}}\n", ["args: expected a mapping"], []),
    "models is a list": ("name: x\nmodels: [a]\n" + TASKS, ["models: expected a mapping (key: value), not a list"], []),
    "no models": ("name: x\nmodels: {}\n" + TASKS, ["models: must not be empty", "embedded:smollm2-135m"], []),
    "no tasks": (HEAD + "tasks: []\n", ["tasks: must not be empty", "lm_eval: hellaswag"], []),
    "empty list of names": (HEAD + "tasks: [{lm_eval: []}]\n", ["tasks.0.lm_eval: must not be empty"], []),
    "missing keys": ("name: x\n", ["2 errors", "models: this key is required", "tasks: this key is required"], []),
    "blank name": ("name: ' '\nmodels: {m: {path: ./m}}\n" + TASKS, ["name: must not be empty"], []),
    "empty name": (
        "name:\nmodels: {m: {path: ./m}}\n" + TASKS,
        ["run.yaml:1: name: expected text, but it is empty"],
        [],
    ),
    "NUL in a name": ('name: "a\\0b"\nmodels: {m: {path: ./m}}\n' + TASKS, ["name: must not contain a NUL"], []),
    "empty path": ("name: x\nmodels: {m: {path: ''}}\n" + TASKS, ["models.m.path: must not be empty"], []),
    "bad limit": (HEAD + "tasks: [{lm_eval: a, limit: 0}]\n", ["tasks.0.limit: expected a count", "not '0'"], []),
    "bad shots": (HEAD + "tasks: [{lm_eval: a, num_fewshot: [0, -1]}]\n", ["num_fewshot: expected a number"], []),
    "bad tokens": (
        "name: x\nmodels: {m: {path: ./m, tokens_trained: 100X}}\n" + TASKS,
        ["models.m.tokens_trained: expected a whole number such as", "not '100X'"],
        [],
    ),
    "tokens do not match steps": (
        "name: x\nmodels:\n  m:\n    path: ./m\n    tokens_trained: [1B]\n"
        "    checkpoints: {pattern: 'c{step}', steps: [1, 2]}\n" + TASKS,
        ["run.yaml:3: models.m: `tokens_trained:` lists 1 numbers for 2 steps"],
        [],
    ),
    "steps without pattern": (
        "name: x\nmodels: {m: {path: ./m, checkpoints: {discover: true, steps: [1]}}}\n" + TASKS,
        ["`steps:` needs a `pattern:`"],
        [],
    ),
    "pattern without step": (
        "name: x\nmodels: {m: {path: ./m, checkpoints: {pattern: 'c_*'}}}\n" + TASKS,
        ["must contain {step} exactly once"],
        [],
    ),
    "endpoint without name": (
        "name: x\nmodels: {m: {path: 'http://h:1'}}\n" + TASKS,
        ["models.m: an endpoint needs `served_model:`"],
        [],
    ),
    "urls of a directory": (
        "name: x\nmodels: {m: {path: ./m, urls: 'http://h'}}\n" + TASKS,
        ["`urls:` is for endpoints"],
        [],
    ),
    "endpoint that we should start": (
        "name: x\nmodels: {m: {path: 'http://h:1', served_model: a}}\nengine: {server: {type: vllm}}\n" + TASKS,
        ["models.m: the path 'http://h:1' is a server that runs already", "leave `server:` out"],
        [],
    ),
    "command with argv and shell": (
        GOOD + "engine: {server: {type: command, argv: [a], shell: b}}\n",
        ["engine.server: needs either `argv:`"],
        [],
    ),
    "reproducible in bfloat16": (
        GOOD + "profile: reproducible\nengine: {server: {type: vllm, args: {dtype: bfloat16}}}\n",
        ["profile: reproducible computes in float32", "'bfloat16'"],
        [],
    ),
    "duplicate key": (
        "name: x\nmodels:\n  m:\n    path: ./a\n    path: ./b\n" + TASKS,
        ["run.yaml:5: the key 'path' appears twice (first on line 4)"],
        [],
    ),
    "tab": ("name: x\nmodels:\n\tm: {path: ./m}\n" + TASKS, ["run.yaml:3: not valid YAML", "spaces, not tabs"], []),
    "unclosed bracket": (HEAD + "tasks: [{lm_eval: a}\n", ["run.yaml:", "not valid YAML"], []),
    "two documents": (GOOD + "---\nname: y\n", ["run.yaml:4: not valid YAML", "a second document begins"], []),
    "unknown tag": (GOOD + "store: !!python/object:os.system x\n", ["run.yaml:4: the YAML tag", "no meaning"], []),
    "alias in itself": (GOOD + "store: &a [*a]\n", ["run.yaml:4", "contains itself"], []),
    "top level is a list": ("- a\n", ["the top level must be a mapping", "a list"], []),
    "top level is a text": ("hello\n", ["the top level must be a mapping", "'hello'"], []),
    "empty file": ("", ["the top level must be a mapping", "empty"], []),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault(fault: str, write: Callable[..., Path]) -> None:
    text, expected, absent = FAULTS[fault]
    with pytest.raises(ConfigError) as caught:
        load_run(write(text))
    message = str(caught.value)
    for part in expected:
        assert part in message
    for part in absent:
        assert part not in message.replace("lm-evaluation", "")
    assert "pydantic" not in message and "Traceback" not in message
    assert caught.value.exit_code == 2


def test_the_common_part_is_valid(write: Callable[..., Path]) -> None:
    assert load_run(write(GOOD)).name == "x"


def test_alias_bomb_is_refused(write: Callable[..., Path]) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    with pytest.raises(ConfigError, match="more than 100000 values"):
        load_run(write("\n".join(lines)))


def test_every_error_on_its_own_line_in_file_order(write: Callable[..., Path]) -> None:
    text = "name: x\nstor: s\nmodels: {m: {path: ./m, a: 1, b: 2}}\ntasks: [{lm_eval: h, limitt: 1}]\nlaunch: 3\n"
    with pytest.raises(ConfigError) as caught:
        load_run(write(text))
    head, *lines = caught.value.message.splitlines()
    assert head.endswith("run.yaml: 5 errors")
    assert [line.split("run.yaml:")[1].split(": ")[1] for line in lines] == [
        "stor",
        "models.m.a",
        "models.m.b",
        "tasks.0.limitt",
        "launch",
    ]


def test_missing_file_names_its_neighbours(write: Callable[..., Path], tmp_path: Path) -> None:
    write(GOOD, "sweep.yaml")
    with pytest.raises(ConfigError, match=r"no such file: .*sweap\.yaml'; next to it: 'sweep\.yaml'"):
        load_run(tmp_path / "sweap.yaml")
    with pytest.raises(ConfigError, match=r"is a directory.*'sweep\.yaml'"):
        load_run(tmp_path)
    with pytest.raises(ConfigError, match="does not exist"):
        load_run(tmp_path / "none" / "run.yaml")


def test_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(b"name: \xff\xfe\n")
    with pytest.raises(ConfigError, match="not UTF-8 text"):
        load_run(path)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (
            "engine.servr.type=vllm",
            "--set engine.servr.type=vllm: engine.servr: unknown key 'servr' for type: openai; did you mean 'server'",
        ),
        ("engin.type=fake", "the configuration has no key 'engin'; did you mean 'engine'"),
        ("tasks.3.limit=1", "tasks is a list of 1; positions are 0 to 0, not 3"),
        ("tasks.first.limit=1", "tasks is a list of 1"),
        ("name.first=1", "name is 'x', which has no keys"),
        ("engine.max_in_flight=none", "--set engine.max_in_flight=none: engine.max_in_flight: expected a whole number"),
        ("models.m.pth=x", "models.m has no key 'pth'; did you mean 'path'"),
        ("engine", "is not of the form KEY=VALUE"),
        ("=3", "is not of the form KEY=VALUE"),
        ("store=[", "not valid YAML"),
        ("extends=a.yaml", "read before overrides"),
    ],
)
def test_bad_override(override: str, expected: str, write: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_run(write(GOOD), [override])
    assert expected in str(caught.value)


def test_extends_cycle_names_the_chain(write: Callable[..., Path]) -> None:
    write("extends: b.yaml\n", "a.yaml")
    write("extends: c.yaml\n", "b.yaml")
    path = write("extends: a.yaml\n", "c.yaml")
    with pytest.raises(ConfigError) as caught:
        load_run(path)
    names = [part.rsplit("/", 1)[-1] for part in caught.value.message.split("circle: ")[1].split(" → ")]
    assert names == ["c.yaml", "a.yaml", "b.yaml", "c.yaml"]


def test_extends_missing_file_says_who_asked(write: Callable[..., Path]) -> None:
    write("name: b\n", "base.yaml")
    with pytest.raises(
        ConfigError, match=r"run\.yaml:4: extends: no such file: .*bass\.yaml'; next to it: 'base\.yaml'"
    ):
        load_run(write(GOOD + "extends: [bass.yaml]\n"))


def test_fault_in_an_extended_file_names_that_file(write: Callable[..., Path]) -> None:
    write("engine:\n  retrys: 3\n", "base.yaml")
    with pytest.raises(ConfigError, match=r"base\.yaml:2: engine\.retrys: unknown key"):
        load_run(write(GOOD + "extends: base.yaml\n"))
