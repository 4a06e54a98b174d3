"""The endpoint as its clients see it."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from forge_ray.artifact import Workspace
from tests.integration.conftest import TINY, Finished, Forge, free_port
from tests.waiting import wait_for

PROMPT = "Deletes the "


@pytest.fixture(scope="module")
def url(forge: Forge, ran: Finished, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`forge serve` of the published model, until the tests of this file are done."""
    folder: Path = tmp_path_factory.mktemp("serve")
    out, err = folder / "out", folder / "err"
    with out.open("w") as stdout, err.open("w") as stderr:
        server = forge.start("serve", str(TINY), "--json", f"--serve.port={free_port()}", stdout=stdout, stderr=stderr)
    try:
        wait_for("the endpoint", lambda: out.read_text().strip() or server.poll() is not None)
        assert server.poll() is None, err.read_text()[-4000:]
        yield json.loads(out.read_text())["url"]
    finally:
        server.send_signal(signal.SIGTERM)
        try:
            assert server.wait(timeout=90) == 0, err.read_text()[-2000:]
        except subprocess.TimeoutExpired:
            server.kill()
            raise


def test_vllm_writes_the_same_greedy_text_as_our_own_model(url: str, forge: Forge, ran: Finished) -> None:
    from openai import OpenAI

    from forge_ray.config import ModelConfig
    from forge_ray.data import tokenizer as vocabulary
    from forge_ray.evaluate.quality import generate
    from forge_ray.train.pretrain import load_model

    workspace = Workspace(str(forge.workspace))
    trained = workspace.get(ran.result["stages"]["pretrain"]["ref"])
    model, end = load_model(trained, ModelConfig.model_validate(trained.manifest.config["model"]), 64)
    tokenizer = vocabulary.load(workspace.get(ran.result["stages"]["tokenizer"]["ref"]))
    ids = generate(model, [end, *tokenizer.encode(PROMPT, add_special_tokens=False).ids], 24, 0.0, end)
    answer = OpenAI(base_url=url, api_key="none").completions.create(
        model="tiny", prompt=PROMPT, max_tokens=24, temperature=0
    )
    assert answer.choices[0].text == tokenizer.decode(ids)


def test_the_answer_of_forge_run_is_the_endpoint_s(url: str, ran: Finished) -> None:
    from openai import OpenAI

    answer = OpenAI(base_url=url, api_key="none").completions.create(
        model="tiny", prompt=PROMPT, max_tokens=12, temperature=0
    )
    assert answer.choices[0].text == ran.result["answer"]


def test_the_openai_client_lists_the_model_and_streams(url: str) -> None:
    from openai import OpenAI

    client = OpenAI(base_url=url, api_key="none")
    assert [model.id for model in client.models.list()] == ["tiny"]
    pieces = [
        chunk.choices[0].text
        for chunk in client.completions.create(model="tiny", prompt=PROMPT, max_tokens=8, temperature=0, stream=True)
        if chunk.choices
    ]
    whole = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=8, temperature=0).choices[0].text
    assert len(pieces) > 1
    assert "".join(pieces) == whole


def test_a_prompt_that_is_too_long_is_the_client_s_error(url: str) -> None:
    from openai import BadRequestError, OpenAI

    with pytest.raises(BadRequestError, match=r"64|length"):
        OpenAI(base_url=url, api_key="none").completions.create(model="tiny", prompt=PROMPT * 100, max_tokens=8)
