"""Tokens of a config reach requests, and nothing that is printed, logged or saved."""

import copy
import dataclasses
import io
import json
import pickle

import pytest
import tiny
import torch
from huggingface_hub.utils import build_hf_headers

from entrocraft_trl import EntrocraftGRPOConfig, EntrocraftRLOOConfig
from entrocraft_trl.credentials import Credential


TOKEN = "hf_TheTokenOfTheTests"


@pytest.fixture(params=[EntrocraftGRPOConfig, EntrocraftRLOOConfig])
def args(request):
    return tiny.build_config(request.param, hub_token=TOKEN, model_init_kwargs={"token": TOKEN, "revision": "main"})


def test_the_live_config_has_its_tokens(args):
    assert args.hub_token == TOKEN and args.model_init_kwargs == {"token": TOKEN, "revision": "main"}
    assert build_hf_headers(token=args.hub_token)["authorization"] == f"Bearer {TOKEN}"
    for twin in (copy.copy(args), copy.deepcopy(args)):
        assert twin.hub_token == TOKEN and twin.model_init_kwargs["token"] == TOKEN


def test_what_is_printed_or_logged_does_not(args):
    shown = [repr(args), str(args), f"{args}", args.to_json_string(), json.dumps(args.to_dict())]
    assert not [text for text in [*shown, str(args.to_sanitized_dict())] if TOKEN in text]
    assert all("'revision': 'main'" in text or '"revision": "main"' in text for text in shown)


def test_what_is_pickled_does_not(args):
    stream = io.BytesIO()
    torch.save(args, stream)  # as transformers writes training_args.bin
    for content in (stream.getvalue(), *(pickle.dumps(args, protocol) for protocol in range(pickle.HIGHEST_PROTOCOL))):
        assert TOKEN.encode() not in content
    read = torch.load(io.BytesIO(stream.getvalue()), weights_only=False)
    assert read.hub_token is None and read.model_init_kwargs == {"token": None, "revision": "main"}
    assert read.output_dir == args.output_dir and read.entropy_low == args.entropy_low


def test_tokens_that_are_set_later_and_configs_of_ones_own(args):
    @dataclasses.dataclass
    class Config(type(args)):  # which gives it a __repr__ of its own
        judge_token: str | None = None

    own = tiny.build_config(Config, judge_token=TOKEN)
    own.hub_token = TOKEN
    assert TOKEN not in repr(own) and own.hub_token == own.judge_token == TOKEN
    assert isinstance(own.hub_token, Credential) and isinstance(own.judge_token, Credential)


def test_other_values_are_left_as_they_are():
    nested = {"dtype": "float32", "quantization_config": {"load_in_4bit": True}}
    args = tiny.build_config(model_init_kwargs=nested)
    assert args.model_init_kwargs is nested and args.hub_token is None
    assert type(args.output_dir) is str
