"""Tokenizers, policies, references, reward models and critics: loaded, checked and frozen."""

import functools
import json
import os
from contextlib import suppress
from pathlib import Path

import torch
import transformers
from transformers import (AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification,
                          AutoTokenizer, GenerationConfig)
from transformers.pytorch_utils import Conv1D
from transformers.utils.peft_utils import find_adapter_config_file

from plumbing.chat import turn_end
from plumbing.errors import explain, require, stop
from plumbing.files import check_path, find, load_function
from plumbing.tryout import ask, check_words

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def from_pretrained(what, auto_class, name, **kwargs):
    """auto_class.from_pretrained(name), from a folder or the hub; exits with one line if it
    fails."""
    check_path(what, name)
    require(not os.path.isdir(name) or any(Path(name).glob("*config.json")),
            f"{what} {name}: not a model folder (it has no config.json)")
    if os.path.isdir(name):
        refuse_adapter(name)
    try:
        return auto_class.from_pretrained(name, trust_remote_code=False, **kwargs)
    except Exception as error:
        refuse_adapter(name)
        stop(f"{what} {name}: {explain(what, name, error)}")


def refuse_adapter(name):
    """Exit if `name`, a folder or hub name, is an adapter (LoRA) as PEFT saves it."""
    path = None
    with suppress(Exception):  # not on the hub, or no connection
        path = find_adapter_config_file(name)
    if path:
        base = json.loads(Path(path).read_text()).get("base_model_name_or_path", "BASE")
        stop(f"model {name}: is a LoRA adapter and not a whole model; merge it into its base once,"
             f" PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({base!r}), {name!r})"
             ".merge_and_unload().save_pretrained(FOLDER), save the tokenizer there too, and name "
             "that folder")


def load_tokenizer(name):
    """A tokenizer from a hub name, a folder, or "file.py:function" returning (model, tokenizer)."""
    if ".py:" in name:
        tokenizer = load_function(name)()[1]
    else:
        tokenizer = from_pretrained("tokenizer", AutoTokenizer, find(name))
    require(tokenizer.eos_token_id is not None,
            f"tokenizer {name}: has no EOS token, so no response could ever end")
    if tokenizer.pad_token_id is None:  # any id will do: masks are built from positions
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(name, device, dtype="float32", shard=False, plain=False,
               gradient_checkpointing=False, auto_class=AutoModelForCausalLM, new=(), **kwargs):
    """Load a model from a hub name, a folder, or "file.py:function" returning (model, tokenizer).

    Weights stay in float32, since Adam's small steps would vanish in bfloat16; dtype "bfloat16"
    runs the forward passes under autocast. Dropout is always off (eval mode), so that sampling and
    updates see the same policy. Only safetensors are loaded, and code from the hub is never run.

    Args: name; device; dtype; shard, plain, gradient_checkpointing (see the flags); auto_class; new
    (names of weights that may be missing); kwargs (for from_pretrained).
    """
    if ".py:" in name:
        model, tokenizer = load_function(name)()
    else:
        tokenizer = load_tokenizer(name)
        model, info = from_pretrained("model", auto_class, find(name), dtype=torch.float32,
                                      use_safetensors=True, output_loading_info=True, **kwargs)
        if getattr(model, "_hf_peft_config_loaded", False):  # from the hub, with PEFT installed
            refuse_adapter(name)
        missing = sorted(set(info["missing_keys"]) - set(new))
        require(not missing, f"model {name}: the weights {', '.join(missing[:3])} are missing, so "
                             "it is another kind of model")
    model.given_name = name
    check_kind(name, model, auto_class)
    check_vocabulary(name, model, tokenizer)
    keep_generation_config_valid(model)
    model = (model if shard else model.to(device)).eval()
    ask(name, model, tokenizer, plain)
    if dtype == "bfloat16":
        for module in (model, model.base_model):
            module.forward = torch.autocast(device.type, torch.bfloat16)(module.forward)
    if gradient_checkpointing:
        recompute_layers(model)
    model.shares_prompts = not (gradient_checkpointing or shard)  # see plumbing/fast.py
    if shard:
        from plumbing.sharding import shard_model

        shard_model(model, device)
        model.to(device)
    return model


def check_kind(name, model, auto_class):
    """Exit unless a model can be trained, and has the head that it is loaded for."""
    require(not getattr(model, "is_quantized", False),
            f"model {name}: is quantized, so its weights cannot be trained; name the model that it "
            "was made from")
    if auto_class is AutoModelForCausalLM:
        return
    require(hasattr(model, "score"), f"model {name}: not a classifier on a causal model; wrap it "
                                     "in a python function")
    require(model.config.num_labels == 1,
            f"model {name}: has {model.config.num_labels} labels; a reward model has 1")


def check_vocabulary(name, model, tokenizer):
    """Exit if the tokenizer makes ids for which the model has no embedding.

    Tokens that were added without a row of their own may stand in a tokenizer and never be used:
    Gemma 3's text models have one. They are noted as model.unembedded, and `try_out` looks for them
    in the data.
    """
    words = max(tokenizer.vocab_size, tokenizer.eos_token_id + 1, tokenizer.pad_token_id + 1)
    rows = model.get_input_embeddings().num_embeddings
    require(words <= rows, f"model {name}: has embeddings for {rows} tokens, but its tokenizer has "
                           f"{words}; they do not belong together")
    model.unembedded = [word for word, number in tokenizer.get_vocab().items() if number >= rows]
    check_words(model, [("its chat template", str(tokenizer.chat_template))])


def recompute_layers(model):
    """Recompute each layer's activations in the backward pass.

    By hand, since transformers supports it only in train mode, in which dropout would be on.
    """
    from torch.utils.checkpoint import checkpoint  # here, since importing them takes 2 seconds
    from transformers.modeling_layers import GradientCheckpointingLayer

    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)


def keep_generation_config_valid(model):
    """Replace a generation config that transformers loads but refuses to save.

    Some models on the hub have one. Without this, a run would fail when it saves its first model.
    """
    config = getattr(model, "generation_config", None)
    try:
        _ = config and config.validate(strict=True)
    except ValueError:
        ids = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id",
                                                        "pad_token_id")}
        model.generation_config = GenerationConfig(**ids)


def freeze(model, dtype):
    """No gradients, and in bfloat16 its weights cast for good, as autocast would at each pass."""
    sharded = getattr(model, "is_sharded", False)
    for module in model.base_model.modules() if dtype == "bfloat16" and not sharded else []:
        if isinstance(module, (torch.nn.Linear, Conv1D)):
            module.to(torch.bfloat16)
    return model.requires_grad_(False)


# ------------------------------------------------------------------------------- by a script's args


def load_policy(args, device):
    """The model that is trained: --model."""
    return load_model(args.model, device, args.dtype, args.shard, args.plain,
                      args.gradient_checkpointing)


def load_reference(args, tokenizer, device, policy=None):
    """The frozen reference policy for the KL: --reference, or the initial policy if there is none.

    Args: args; tokenizer (the policy's); device; policy (before training; not read if there is
    a --reference).
    """
    name = args.reference or args.model
    require(load_tokenizer(name).get_vocab() == tokenizer.get_vocab(),
            f"reference {name}: its vocabulary is not the policy's, so there is no KL between them")
    reference = load_model(name, device, args.dtype, args.shard, args.plain)
    require(reference is not policy, f"model {name}: the function returns the same model each "
                                     "time; let it make or load a new one at each call")
    if not args.reference and ".py:" in name:  # whose second call may return other weights
        reference.load_state_dict(policy.state_dict())
    return freeze(reference, args.dtype)


def load_classifier(name, device, dtype="float32", shard=False, plain=False,
                    gradient_checkpointing=False, new_head=False):
    """A reward model or critic: a causal model with a one-label head called `score`.

    Args: as of `load_model`; new_head (whether the weights of the head may be missing).
    """
    new, kwargs = (["score.weight"], {"num_labels": 1}) if new_head else ([], {})
    return load_model(name, device, dtype, shard, plain, gradient_checkpointing,
                      AutoModelForSequenceClassification, new, **kwargs)


def load_critic(args, tokenizer, device):
    """The value model: --critic; by default the reward model, or the policy and a new head."""
    name = args.critic or (args.model if ".py:" in args.reward[0] else args.reward[0])
    require(load_tokenizer(name).get_vocab() == tokenizer.get_vocab(),
            f"critic {name}: its vocabulary is not the policy's; choose another --critic")
    return load_classifier(name, device, args.dtype, args.shard, args.plain,
                           args.gradient_checkpointing, new_head=True)


# -------------------------------------------------------------------------------------------- more


def fitting_tokens(name, device):
    """How many tokens have activations and logits of half a GB in an update.

    More at once are slower on a CPU.
    """
    if device.type != "cpu" or ".py:" in name:
        return 8192
    config = from_pretrained("model", AutoConfig, find(name)).get_text_config()
    numbers = 24 * config.hidden_size * config.num_hidden_layers + 3 * config.vocab_size  # a token
    return min(8192, 2**27 // numbers)


def eos_ids(model, tokenizer):
    """Every token id that ends a response.

    The tokenizer's EOS, what ends a turn in its chat template, and the generation config's.
    """
    more = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    more = more if isinstance(more, list) else [more]
    ids = {tokenizer.eos_token_id, turn_end(tokenizer), *more} - {None}
    return torch.tensor(sorted(ids), device=model.device)
