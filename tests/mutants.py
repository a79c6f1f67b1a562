"""Plants bugs in the code, one at a time, and shows whether the tests notice them.

    python -m tests.mutants                   all of them, several at once: a table and the score
    python -m tests.mutants -k rotary opt     those whose names contain one of these words
    python -m tests.mutants --list            names and places, without running anything

A bug is an exact replacement in one file. The tree is copied to a temporary folder, the bug is
planted there, and the test files that should notice it run until the first failure. Before that
these files run once as they are, and must pass. Exit status 1 where a bug survives that is not
known to be equivalent, which means that no test could notice it.

tests/test_mutants.py, a part of `make test`, fails where a replacement no longer fits the source.
The bugs themselves are not planted there, as that takes minutes.
"""

import argparse
import multiprocessing
import os
import queue
import re
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 1200  # for the tests of one bug, which take a few as a rule


class Mutant(NamedTuple):
    name: str
    file: str
    old: str  # occurs exactly once in the file
    new: str
    tests: str  # the files in tests/ that should notice, without test_ and .py
    equivalent: str = ""  # why no test can notice


# fmt: off
MUTANTS = [
    # The objective.
    Mutant("L_OR pulls the chosen answer down", "orpo.py",
           "return (-1 / den).to(dtype)", "return (1 / den).to(dtype)", "orpo"),
    Mutant("delta lacks its inverse", "orpo.py",
           "torch.where(den == 0, 0.5, u / den)", "torch.where(den == 0, 0.5, den / u)", "orpo"),
    Mutant("log1mexp by one formula alone", "orpo.py",
           "near = y > -math.log(2)", "near = y > -1e9", "orpo"),
    Mutant("log P is a sum and not a mean", "orpo.py",
           "means = (sums / lengths).clamp(", "means = sums.clamp(", "orpo"),
    Mutant("no floor below certainty", "orpo.py",
           "clamp(max=-torch.finfo(sums.dtype).tiny)", "clamp(max=0)", "orpo"),
    Mutant("odds without 1 - P", "orpo.py",
           "return (y - log1mexp(y)).to(", "return y.to(", "orpo"),
    Mutant("lam 0 times infinity", "orpo.py", "if lam == 0:", "if lam < 0:", "orpo"),
    Mutant("L_OR averaged over the micro-batch", "orpo.py",
           "nll + lam / n_pairs * pair_losses.sum()", "nll + lam * pair_losses.mean()", "orpo"),
    Mutant("prompt tokens count in log P", "orpo.py",
           "torch.where(in_response[rows], logps, 0))", "logps)", "orpo"),
    Mutant("L_OR reaches prompt tokens", "orpo.py",
           "d_token = torch.where(in_response[rows], d_token, 0)", "pass", "orpo"),
    Mutant("lm_head's gradient of the last group alone", "orpo.py",
           "product if total is None else total.add_(product)", "product", "orpo"),
    Mutant("lm_head's gradient summed in bfloat16", "orpo.py",
           "(a @ b).to(result_dtype(a))", "a @ b", "orpo"),
    Mutant("log-softmax in bfloat16", "orpo.py",
           "others = logits.to(result_dtype(logits))", "others = logits.clone()", "orpo"),
    Mutant("a long pair's slices all have the last one's logits", "orpo.py",
           "if stop - start > MAX_ROWS:", "if False:", "orpo"),
    Mutant("a group that cuts a pair is joined with its neighbour only", "orpo.py",
           "reach = max([reach, *(", "reach = max([0, *(", "orpo"),
    Mutant("groups may leave out rows", "orpo.py",
           "elif [0, *(stop for", "elif False and [0, *(stop for", "orpo"),
    Mutant("the compiled softmax keeps its target", "orpo.py",
           "== target, value, x)", "== target, x, x)", "orpo"),
    Mutant("a compiled softmax is never taken", "orpo.py",
           "(softmax_kernel or plain_softmax)", "plain_softmax", "operations"),
    Mutant("a kernel that fails after it ran is plain from then on", "run/compiled.py",
           'if self.state == "compiled" or isinstance', "if isinstance", "operations"),
    Mutant("a kernel that runs out of memory is plain from then on", "run/compiled.py",
           " or isinstance(error, torch.OutOfMemoryError)", "", "operations"),
    Mutant("a compiled block has kernels of their own in it", "run/compiled.py",
           'if torch.compiler.is_compiling() or self.state == "failed":',
           'if self.state == "failed":', "operations"),
    Mutant("small tensors go to a kernel", "run/compiled.py",
           " or x.numel() < self.smallest", "", "operations"),
    Mutant("a compiled block that runs twice keeps no attention", "run/compiled.py",
           "KEPT = [*PRODUCTS, torch.ops.torch_attn._varlen_attn.default]", "KEPT = PRODUCTS",
           "attention"),
    Mutant("a CPU gets a GPU's micro-batches", "run/flags.py",
           "(8192 if on_gpu else 2048)", "8192", "flags"),
    Mutant("a compiled block's second run takes a third more time", "run/plan.py",
           "        share = 0\n", "        pass\n", "plan"),
    Mutant("adapters are advised to be sharded", "run/plan.py",
           "if not config.lora_rank:  # which", "if True:  # which", "plan"),
    Mutant("backward ignores what comes from above", "orpo.py",
           "return grad_hidden.mul_(grad), grad_lm_head,", "return grad_hidden, grad_lm_head,",
           "orpo"),
    # Pairs and batches.
    Mutant("prompts leak over the held-out split", "data.py",
           "    for row in rows:\n        (test if json.dumps(row.prompt) in held_out else train)",
           "    share = n * len(rows) // len(prompts)\n    for i, row in enumerate(rows):\n"
           "        (test if i in epoch_permutation(len(rows), seed, 0)[:share] else train)",
           "data"),
    Mutant("another share is held out", "data.py",
           "round(fraction * len(prompts))", "round(fraction * len(prompts) / 2)", "data"),
    Mutant("roles stay as they are published", "formats/messages.py",
           "NAMES.get(known, name)", "name", "messages"),
    Mutant("a prompt is guessed whatever else is there", "formats/rows.py",
           "if key not in answers and is_text(key, value)]", "if False]", "messages"),
    Mutant("what a template leaves out of the prompt is not seen", "data.py",
           "missing = left_out(row.prompt, prompt)", "missing = []", "data"),
    Mutant("a short text is found within a longer one", "formats/chat_template.py",
           'text = text.replace(form, "\\0", 1)', "pass", "data"),
    Mutant("tools do not reach the template", "formats/rows.py",
           '"tools": self.tools, **', '"tools": None, **', "data"),
    Mutant("each start has its own day", "run/folder.py",
           'return config.date or then.get("date") or', "return config.date or", "resume"),
    Mutant("instruction is no column", "formats/rows.py",
           '("prompt", "instruction", "question", "m', '("prompt", "question", "m', "data"),
    Mutant("a response without EOS", "data.py",
           "chosen, rejected = [*chosen, tokenizer.eos_id], [*rejected, tokenizer.eos_id]", "pass",
           "data"),
    Mutant("a response begins like a text", "data.py",
           "tokenizer.encode(text, continuation=True, after=prompt)", "tokenizer.encode(text)",
           "data"),
    Mutant("a response after a special token continues it", "formats/tokenizer.py",
           "if continuation and len(after) and", "if False and", "tokenizer"),
    Mutant("BOS twice after a template", "data.py",
           "tokenizer.bos_id is None or ids[:1] == [tokenizer.bos_id]", "tokenizer.bos_id is None",
           "data"),
    Mutant("the rejected answer is cut by the chosen one's length", "data.py",
           "chosen[:room], rejected[:room]))", "chosen[:room], rejected[: len(chosen[:room])]))",
           "data"),
    Mutant("long prompts stay", "data.py",
           "if len(prompt) > max_prompt_length:", "if False:", "data"),
    Mutant("equal answers stay", "data.py", "if chosen == rejected:", "if False:", "data"),
    Mutant("answers that are equal once cut stay", "data.py",
           "if chosen[:room] == rejected[:room]:", "if False:", "data"),
    Mutant("a prompt without BOS", "data.py",
           "    return [tokenizer.bos_id, *ids]", "    return ids", "data"),
    Mutant("the order ignores the seed", "data.py",
           "default_rng([seed, epoch])", "default_rng([0, epoch])", "data"),
    Mutant("the rejected answer's positions go on from the chosen one's", "data.py",
           "np.r_[0 : p + c, p : p + r]", "np.r_[0 : p + c, p + c : p + c + r]",
           "data"),
    Mutant("the rejected answer is predicted from the chosen one's end", "data.py",
           "- 1, chosen_at - 1, rejected_at", "- 1, rejected_at - 1, rejected_at",
           "data"),
    Mutant("the rejected answer sees other keys than the prompt's", "data.py",
           "np.r_[at:rejected_at, at:chosen_at, rejected_at:end]",
           "np.r_[at:rejected_at, at + c : chosen_at + c, rejected_at:end]",
           "data"),
    Mutant("L_SFT normalised by the micro-batch", "data.py",
           "_pack(part, len(pairs), n_full,", "_pack(part, len(part), n_full,", "data"),
    Mutant("full counts the first token too", "data.py",
           "sum(p + c - 1 for p, c, _ in", "sum(p + c for p, c, _ in", "data"),
    Mutant("L_SFT weighs tokens and not pairs", "data.py",
           "(n_pairs * c if n_full is None", "(n_pairs if n_full is None", "data"),
    Mutant("a pair is left out of each epoch's end", "data.py",
           "math.ceil(n_pairs / batch_size)", "n_pairs // batch_size",
           "train"),
    # Tokens.
    Mutant("a shorter special token first", "formats/tokenizer.py",
           "key=len, reverse=True", "key=len", "tokenizer"),
    Mutant("merges by the highest rank", "formats/bpe.py",
           "heappush(heap, (ranks[pair], left))", "heappush(heap, (-ranks[pair], left))",
           "tokenizer"),
    Mutant("templates keep the newline after a block", "formats/chat_template.py",
           "trim_blocks=True, ", "trim_blocks=False, ", "tokenizer"),
    Mutant("templates keep spaces before a block", "formats/chat_template.py",
           "lstrip_blocks=True", "lstrip_blocks=False", "tokenizer"),
    Mutant("no NFC", "formats/words.py", "unicodedata.normalize(form, text)", "text", "tokenizer"),
    Mutant("ignore_merges is ignored", "formats/bpe.py",
           "if self.ignore_merges and word in self.vocab:", "if False:", "tokenizer"),
    # The transformer.
    Mutant("another rope_theta", "model.py",
           "frequency = config.rope_theta **", "frequency = 10000.0 **",
           "model"),
    Mutant("linear rope scaling left out", "model.py",
           'frequency = frequency / scaling["factor"]', "pass", "families"),
    Mutant("llama3 rope scaling stretches every wave", "model.py",
           "frequency * (keep + (1 - keep) / scaling", "frequency * (1 / scaling",
           "families"),
    Mutant("llama3 rope scaling without a fade", "model.py",
           "((turns - low) / (high - low)).clamp(0, 1)", "(turns > low).float()",
           "families"),
    Mutant("partial rotary turns all", "formats/families.py",
           '"layer_norm_eps", "rotary_fraction": "partial_rotary_factor"', '"layer_norm_eps"',
           "families"),
    Mutant("the gradient of rotary turns the wrong way", "model.py",
           "(grad, cos, -sin)", "(grad, cos, sin)", "model"),
    Mutant("a prompt's keys hand back one gradient of two", "attention.py",
           "torch.where(twice, first + last, first)", "first", "attention"),
    Mutant("queries aligned at the beginning", "attention.py",
           "np.minimum(k_lens - q_lens + np.arange(n_q), k_lens - 1)",
           "np.minimum(np.arange(n_q), k_lens - 1)", "attention"),
    Mutant("a window is one longer", "attention.py",
           "(back >= (window or np.inf))", "(back > (window or np.inf))", "families"),
    Mutant("a window one shorter than the longest run is dropped", "attention.py",
           "window >= segments.max_k:", "window >= segments.max_k - 1:", "attention"),
    Mutant("a window is one longer on CUDA", "attention.py",
           "-1 if window is None else window - 1", "-1 if window is None else window",
           "attention"),
    Mutant("Mistral's windows are ignored", "formats/families.py",
           '"max_seq_len": 131072}, supported=ROPE,\n        windows=True',
           '"max_seq_len": 131072}, supported=ROPE,\n        windows=False',
           "families"),
    Mutant("windows in every layer of Qwen", "formats/config.py",
           'first = 0 if everywhere else found.get("max_window_layers", 28)', "first = 0",
           "families"),
    Mutant("no norm of queries and keys", "model.py",
           "q, k = self.q_norm(q), self.k_norm(k)\n        if self.has",
           "pass\n        if self.has", "families"),
    Mutant("keys by the queries' norm", "model.py",
           "self.k_norm(k)\n        if self.has", "self.q_norm(k)\n        if self.has",
           "families"),
    Mutant("Gemma's norms without the 1", "model.py",
           "weight = 1 + self.weight.to(wide)", "weight = self.weight.to(wide)", "families"),
    Mutant("Gemma's 1 + weight is rounded to bfloat16", "model.py",
           "wide = torch.promote_types(x.dtype, torch.float32)", "wide = x.dtype", "families"),
    Mutant("Gemma's new norms start at two", "model.py",
           "torch.zeros(dim) if self.adds_one else torch.ones(dim)", "torch.ones(dim)", "families"),
    Mutant("Gemma's embeddings without the root", "model.py",
           "x = x * x.new_full((), self.config.dim**0.5)", "pass", "families"),
    Mutant("Gemma's root is never rounded", "model.py",
           "x.new_full((), self.config.dim**0.5)", "self.config.dim**0.5", "families"),
    Mutant("Gemma's gelu is the exact one", "formats/config.py",
           'source["model_type"] == "gemma" and', "False and", "families"),
    Mutant("Gemma's lm_head is not tied by default", "formats/families.py",
           '"scale_embeddings": True, "tie_embeddings": True,', '"scale_embeddings": True,',
           "families"),
    Mutant("OLMo 2's norms in front", "model.py",
           "        if self.norm_outputs:", "        if False:", "families"),
    Mutant("OLMo 2's norms after the addition", "model.py",
           "return x + self.post_attention_layernorm(self.mlp(x))",
           "return self.post_attention_layernorm(x + self.mlp(x))  #", "families"),
    Mutant("OLMo 2's queries and keys without their norm", "model.py",
           "        if self.qk_norm_joint:", "        if False:", "families"),
    Mutant("OLMo 2's keys by the queries' norm", "model.py",
           "self.k_norm(k)\n        q, k, v", "self.q_norm(k)\n        q, k, v", "families"),
    Mutant("SmolLM3 with rotary in every layer", "model.py",
           "c.rope_layers[layer] and c.rotary_dim > 0", "c.rotary_dim > 0", "families"),
    Mutant("SmolLM3's first layer of four has no rotary", "formats/config.py",
           "int((i + 1) % n != 0)", "int(i % n != 0)", "families"),
    Mutant("SmolLM3's windows where rotary is", "formats/config.py",
           '"full" if rotary else "sliding_attention"', '"sliding_attention" if rotary else "full"',
           "families"),
    Mutant("a null of key/value heads is the family's default", "formats/config.py",
           'if source.get("num_key_value_heads", 0) is None:', "if False:", "families"),
    Mutant("longrope without its short factor", "model.py",
           'frequency / to_device(torch.tensor(scaling["short_factor"]), positions.device)',
           "frequency", "families"),
    Mutant("longrope turns without its attention factor", "model.py",
           'scaling.get("attention_factor", 1.0)', "1.0", "families"),
    Mutant("longrope's context is that of its long factor", "formats/config.py",
           'values["max_seq_len"] = min(first, context)', "pass", "families"),
    Mutant("longrope is saved with the cut context", "formats/config.py",
           'known.pop("max_position_embeddings")', "pass", "families"),
    Mutant("OPT's positions without their offset", "model.py",
           "self.embed_positions(positions + self.config.position_offset)",
           "self.embed_positions(positions)", "families"),
    Mutant("GPT-2's matrices as they are stored", "formats/families.py",
           'prefix="transformer.", conv1d=True', 'prefix="transformer.", conv1d=False',
           "families"),
    Mutant("gelu_new is the exact gelu", "model.py",
           'f"gelu_{x}": GELU_TANH', 'f"gelu_{x}": F.gelu', "families"),
    Mutant("Phi's MLP without the norm", "model.py",
           "cache) + self.mlp(y)", "cache) + self.mlp(x)", "families"),
    Mutant("Phi's lm_head bias is left out of the loss", "model.py",
           "F.pad(self.lm_head.bias[:, None], (0, 7))",
           "F.pad(0 * self.lm_head.bias[:, None], (0, 7))", "families"),
    Mutant("LayerNorm with another eps", "model.py",
           "self.bias.to(x.dtype), self.eps)", "self.bias.to(x.dtype), 1e-5)",
           "families"),
    Mutant("RMSNorm with another eps", "model.py",
           "F.rms_norm(x, weight.shape, weight, self.eps)",
           "F.rms_norm(x, weight.shape, weight, 1e-6)", "model"),
    Mutant("temperature multiplies", "model.py",
           "logits = logits / temperature", "logits = logits * temperature",
           "generation"),
    Mutant("top_p counts the token itself", "model.py",
           "probs.cumsum(-1) - probs >= top_p", "probs.cumsum(-1) >= top_p",
           "generation"),
    Mutant("a finished row goes on", "model.py",
           "        if ends is not None:", "        if False:", "generation"),
    Mutant("an answer ends with EOS only", "formats/tokenizer.py",
           "*(i for i in ids[:1] if i in self.added_ids)]", "]", "tokenizer"),
    Mutant("what a template puts before an answer is part of it", "formats/tokenizer.py",
           "return before.strip(), after.strip()", 'return "", after.strip()', "tokenizer"),
    Mutant("each new token is at the first positions", "attention.py",
           "(first + old, n_new), (old, n_new)", "(first + old, n_new), (0 * old, n_new)",
           "generation"),
    Mutant("adapters count 1 / rank", "run/lora.py",
           "base.weight, base.bias, alpha / rank", "base.weight, base.bias, 1 / rank", "lora"),
    Mutant("a merged change is not scaled", "run/lora.py",
           "(scale * (lora_B.double()", "(1.0 * (lora_B.double()", "lora"),
    Mutant("adapters that start at zero on both sides", "run/lora.py",
           ".uniform_(-bound, bound, generator=generator)", ".zero_()", "lora"),
    # Folders.
    Mutant("pickles in preference to safetensors", "formats/weights.py",
           'kinds = ("model.safetensors", read_safetensors), ("pytorch_model.bin", _read_pickle)',
           'kinds = ("pytorch_model.bin", _read_pickle), ("model.safetensors", read_safetensors)',
           "weights"),
    Mutant("the dtype of config.json and not of the tensors", "model.py",
           'config.dtype = str(stored.dtype).removeprefix("torch.")', "pass",
           "weights"),
    Mutant("a loaded model is in training mode", "model.py",
           "return model.eval()", "return model.train()", "weights"),
    Mutant("old GPT-2 buffers are unknown tensors", "formats/weights.py",
           '(".inv_freq", ".attn.bias", ".attn.masked_bias")', '(".inv_freq", ".attn.masked_bias")',
           "families"),
    Mutant("an untied lm_head is passed over", "formats/weights.py",
           'name == "lm_head.weight" and name not in shapes', 'name == "lm_head.weight"',
           "weights"),
    Mutant("an older model's shards stay", "formats/weights.py",
           "        old.unlink()", "        pass", "weights"),
    Mutant("shards are measured in float32", "formats/weights.py",
           "numel() * dtype.itemsize\n        if shards", "numel() * 4\n        if shards",
           "weights"),
    Mutant("one checkpoint more is kept", "run/saving.py",
           "in before[keep:]:", "in before[keep + 1 :]:", "resume"),
    Mutant("rotation takes later steps", "run/saving.py",
           "if folder.name <= final.name", "if folder", "run_folder"),
    Mutant("whatever bears our names is taken", "run/folder.py",
           "if found := not_ours(out):", "if found := []:", "run_folder"),
    Mutant("the second of every signal kills", "run/processes.py",
           "if number == signal.SIGINT:\n            signal.signal",
           "if True:\n            signal.signal", "resume"),
    Mutant("a broken pipe ends the run", "run/printing.py",
           "self.give_up(error)\n            return len(text)", "raise", "printing"),
    Mutant("a run that is trained longer stays finished", "run/folder.py",
           "(out / FINISHED).unlink(missing_ok=True)\n    rows", "rows", "resume"),
    Mutant("the digest leaves the rejected answer out", "run/saving.py",
           "for ids in pair[:3]:", "for ids in pair[:2]:", "resume"),
    Mutant("memory is printed in 1/1024 of gigabytes", "run/plan.py",
           "else 2**20)", "else 2**30)", "plan"),
    Mutant("blocks computed twice count twice", "run/plan.py",
           "again = share / (", "again = share * (", "plan"),
    Mutant("time left from the run's beginning", "run/log.py",
           "/ (step - self.start) * ", "/ step * ", "log"),
    Mutant("adapters begin with other numbers", "run/lora.py",
           "bound = base.in_features**-0.5", "bound = base.out_features**-0.5", "lora"),
    Mutant("special_tokens_map beats tokenizer_config", "formats/tokenizer.py",
           'config = named | config if "added_tokens_decoder" in config else', "config =",
           "tokenizer"),
    Mutant("LlamaConfig's default is BOS of a class without one", "formats/tokenizer.py",
           'if bare and not config.get("add_bos_token"):', "if False:", "tokenizer"),
    Mutant("the template for tools is not taken", "formats/tokenizer.py",
           "template = (tools and self.tool_use_template) or", "template =", "messages"),
    Mutant("a row's template arguments are not given", "formats/rows.py",
           "**(self.template_kwargs or {})", "**{}", "data"),
    Mutant("merges of the number sign are comments", "formats/tokenizer.py",
           'm[:8] != "#version"', 'm[0] != "#"', "tokenizer"),
    Mutant("windows that are switched off are there", "formats/config.py",
           'found.get("use_sliding_window")', '"use_sliding_window" in found', "families"),
    Mutant("a stale dtype beside torch_dtype", "formats/config.py",
           'left_out = ("dtype", "auto_map"', 'left_out = ("auto_map"', "families"),
    Mutant("each tensor is a file after the first shard", "formats/weights.py",
           "shards, size = [*shards, {}], 0", "shards = [*shards, {}]", "weights"),
    Mutant("a pair without a response is let in", "orpo.py",
           "if len(lengths) % 2 or not bool(lengths.all()):", "if False:", "orpo"),
    Mutant("a streamed answer runs over the end of its turn", "tools/sample.py",
           "tokenizer.end_ids()", "[tokenizer.eos_id]", "examples"),
    Mutant("a system column beside a system message is a second one", "tools/forms.py",
           'isinstance(system, str) and prompt[0]["role"] != "system"', "isinstance(system, str)",
           "forms"),
    Mutant("the oldest checkpoint is resumed", "run/folder.py",
           "sorted(ours, reverse=True)", "sorted(ours)", "resume"),
    Mutant("checkpoints without Adam's state", "run/saving.py",
           ' | {f"{name}.{k}": x for k, x in optimizer.state[p].items()}', "", "resume"),
    Mutant("the row of the step that is resumed from is lost", "run/folder.py",
           'if row["step"] <= start and', 'if row["step"] < start and', "resume"),
    Mutant("adapters are resumed on another base", "run/saving.py",
           "if frozen is not None and not", "if False and not", "lora"),
    Mutant("every model is handed back in float32", "run/saving.py",
           "dtype=getattr(torch, model.config.dtype))", "dtype=torch.float32)",
           "train"),
    # A step.
    Mutant("in bfloat16 the first micro-batch alone has gradients", "train.py",
           "output.loss.backward()  # gradients just",
           'if not outputs or config.dtype == "float32":\n'
           "            output.loss.backward()  # gradients just", "step"),
    Mutant("in bfloat16 later micro-batches count twice", "train.py",
           "output.loss.backward()  # gradients just",
           '(output.loss * (1 + (config.dtype == "bfloat16" and bool(outputs)))).backward()  #',
           "step"),
    Mutant("masters in bfloat16", "train.py",
           'config.dtype if config.lora_rank else "float32")', "config.dtype)",
           "train"),
    Mutant("products in float32 whatever --dtype says", "train.py",
           "model.compute_dtype = getattr(torch, config.dtype)",
           "model.compute_dtype = torch.float32", "train"),
    Mutant("no weight decay", "train.py", "weight_decay=decay", "weight_decay=0.0",
           "step"),
    Mutant("weight decay of norms and biases", "train.py",
           '"weight_decay": 0.0}', '"weight_decay": config.weight_decay}', "step"),
    Mutant("no clipping", "train.py",
           "config.grad_clip or math.inf", "math.inf", "step"),
    Mutant("clipping at 1", "train.py",
           "config.grad_clip or math.inf", "1.0", "step"),
    Mutant("--grad-clip 0 clips everything away", "train.py",
           "config.grad_clip or math.inf", "config.grad_clip", "step"),
    Mutant("another beta1", "train.py",
           "(config.adam_beta1, config.adam_beta2)", "(0.9, config.adam_beta2)",
           "step"),
    Mutant("another beta2", "train.py",
           "(config.adam_beta1, config.adam_beta2)", "(config.adam_beta1, 0.999)",
           "step"),
    Mutant("another eps", "train.py", "eps=1e-8", "eps=1e-6", "step"),
    Mutant("the schedule reaches matrices alone", "train.py",
           'for group in optimizer.param_groups:\n        group["lr"] = lr',
           'for group in optimizer.param_groups[:1]:\n        group["lr"] = lr',
           "flags"),
    Mutant("a warm-up of one step more", "train.py",
           "config.lr * step / warmup", "config.lr * step / (warmup + 1)",
           "train"),
    Mutant("the decay begins one step early", "train.py",
           "(step - 1 - warmup) / max", "(step - warmup) / max",
           "train"),
    Mutant("gradients stay for the next step", "train.py",
           "    optimizer.step()\n    optimizer.zero_grad(set_to_none=True)\n    return",
           "    optimizer.step()\n    return",
           "step"),
    Mutant("updates go on after one that is not finite", "train.py",
           "optimizer.found_inf.maximum(~", "torch.maximum(0 * optimizer.found_inf, ~",
           "not_finite resume distributed"),
    Mutant("the trial counts as an update", "train.py",
           'state["step"].zero_()', "pass", "not_finite"),
    Mutant("the trial's gradients stay", "train.py",
           "backward()\n    optimizer.zero_grad(set_to_none=True)\n    tell_peak",
           "backward()\n    tell_peak", "plan"),
    Mutant("the smallest micro-batch is tried", "run/plan.py",
           "parts[tokens.index(max(tokens))]", "parts[tokens.index(min(tokens))]",
           "plan"),
    # A run.
    Mutant("--epochs is ignored", "run/plan.py",
           "c.max_steps or c.epochs * an_epoch", "c.max_steps or an_epoch", "flags"),
    Mutant("--eval-every is ignored", "train.py",
           "due(step, config.eval_every)", "due(step, 0)", "log"),
    Mutant("--lora-alpha is ignored", "train.py",
           "add_lora(model, config.lora_rank, config.lora_alpha, config.seed)",
           "add_lora(model, config.lora_rank, 16.0, config.seed)", "flags"),
    Mutant("adapters ignore the seed", "train.py",
           "config.lora_alpha, config.seed)", "config.lora_alpha, 0)", "flags"),
    Mutant("--chat-template is ignored", "train.py",
           "load_tokenizer(config.model, config.chat_template)", "load_tokenizer(config.model)",
           "train"),
    Mutant("--log-every is ignored", "run/log.py",
           "due(step, self.config.log_every)", "due(step, 1)",
           "log"),
    Mutant("--activation-checkpointing is ignored", "train.py",
           "model.checkpointed_blocks = model.config.n_layers if n is True else int(n)",
           "model.checkpointed_blocks = 0", "flags"),
    Mutant("--seed does not decide the order", "data.py",
           "epoch_permutation(len(pairs), seed, epoch)",
           "epoch_permutation(len(pairs), 42, epoch)", "flags"),
    Mutant("every epoch in one order", "data.py",
           "epoch_permutation(len(pairs), seed, epoch)",
           "epoch_permutation(len(pairs), seed, 0)", "train"),
    Mutant("--max-length beyond the context", "train.py",
           "config.max_length = min(config.max_length, context)", "pass", "flags"),
    Mutant("resuming compares lam alone", "run/flags.py",
           "if now == before or name in", 'if now == before or name != "lam" or name in',
           "flags"),
    Mutant("evaluation keeps what a backward pass needs", "train.py",
           "@torch.no_grad()\ndef evaluate(", "def evaluate(",
           "evaluation"),
    Mutant("evaluation over some of the pairs", "train.py",
           "for batch in pack(pairs, config):\n            outputs",
           "for batch in pack(pairs, config)[:1]:\n            outputs",
           "evaluation"),
    Mutant("metrics of the first micro-batch alone", "train.py",
           "chosen = torch.cat([o.chosen_logps for o in outputs])",
           "chosen = torch.cat([outputs[0].chosen_logps for o in outputs])",
           "train"),
    Mutant("margins without lam", "train.py",
           '"rewards/margins": lam * (', '"rewards/margins": (',
           "train"),
    Mutant("a substring is an accepted answer", "run/answers.py",
           "good = [text in accept for",
           "good = [any(text in x or x in text for x in accept) for",
           "evaluation"),
    Mutant("greedy and sampled swapped", "run/answers.py",
           '(("sampled", 1.0), ("greedy", 0.0))', '(("sampled", 0.0), ("greedy", 1.0))',
           "evaluation"),
    Mutant("rows without accept count as wrong", "run/answers.py",
           "asked = [pair for pair in pairs if pair.accept is not None]",
           "asked = [pair._replace(accept=pair.accept or []) for pair in pairs]",
           "evaluation"),
    Mutant("tokens per second of pairs", "run/log.py",
           "self.n_tokens += sum(pair.n_tokens for pair in pairs)", "self.n_tokens += len(pairs)",
           "log"),
    Mutant("tokens per second without the steps between rows", "run/log.py",
           "            self.n_tokens, self.flops = 0, 0\n", "", "log"),
    Mutant("evaluation counts in tokens per second", "run/log.py",
           "self.clock, self.begin = self.clock + pause,", "self.clock, self.begin = self.clock,",
           "log"),
    Mutant("epochs are counted in steps", "run/log.py",
           '"epoch": step / self.steps_an_epoch', '"epoch": step / self.n_steps',
           "log"),
    Mutant("the base's end of an answer comes first", "run/saving.py",
           "[run.tokenizer.eos_id, *named]", "[*named, run.tokenizer.eos_id]", "served"),
    Mutant("BOS is not served to strings", "run/saving.py", "if run.plain:", "if False:", "served"),
    Mutant("a head of its own is dropped", "formats/weights.py",
           "if len(tied) == 2 and not _equal", "if False and not _equal", "served"),
    Mutant("lm_head's gradient is rounded to the hidden states' dtype", "orpo.py",
           "grad_lm_head.mul_(grad).to(ctx.lm_head_dtype)",
           "grad_lm_head.mul_(grad).to(grad_hidden.dtype)", "operations"),
    Mutant("the nucleus is taken at temperature 1", "model.py",
           "probs = sorted_logits.softmax(-1)", "probs = (sorted_logits * temperature).softmax(-1)",
           "generation"),
    Mutant("operations of attention by the model's width", "model.py",
           "12 * c.n_heads * c.head_dim * int", "12 * c.dim * int", "operations"),
    Mutant("BOS anywhere in a prompt is enough", "data.py",
           "is None or ids[:1] == [tokenizer.bos_id]", "is None or tokenizer.bos_id in ids",
           "tokenizer"),
    Mutant("metrics are divided by --batch-size", "train.py",
           "metrics_of(outputs, config.lam, len(pairs_of(step)))",
           "metrics_of(outputs, config.lam, config.batch_size)", "train"),
    Mutant("evaluation pairs may change on --resume", "train.py",
           '{"data": digest(pairs), "eval_data": digest(eval_pairs)}', '{"data": digest(pairs)}',
           "resume"),
    Mutant("what is left out of a rejected answer is silent", "data.py",
           "in zip((row.chosen, row.rejected), responses, strict=True):",
           "in zip((row.chosen,), responses[:1], strict=True):", "data"),
    Mutant("a triangle is taken for one by its queries", "attention.py",
           "triangle = len(set(group)) == 1 and", "triangle = len({n for n, _ in group}) == 1 and",
           "attention"),
    Mutant("a head of its own is looked for by Llama's name", "formats/weights.py",
           "f\"{family.modules.get('embed_tokens', 'embed_tokens')}.weight\"",
           '"embed_tokens.weight"', "families"),
    Mutant("what is said twice is looked for once", "formats/chat_template.py",
           'text.replace(form, "\\0", 1)', 'text.replace(form, "\\0")', "data"),
    Mutant("BOS is served to strings only where there are no messages", "run/saving.py",
           "    if run.plain:", "    if run.plain and not run.chat:", "served"),
    Mutant("rope_theta at the top wins", "formats/config.py",
           'rope.setdefault("rope_theta", theta) != theta', "False", "served"),
    Mutant("an adapter is passed over", "formats/files.py",
           'if (path / "adapter_config.json").is_file():', "if False:", "served"),
    Mutant("OUT/run.json with relative paths", "run/flags.py",
           "name: str(Path(path).resolve()) for name", "name: path for name",
           "flags"),
    Mutant("gradients are not summed over processes", "train.py",
           "sum_over_processes([loss, *gradients])", "sum_over_processes([loss])", "distributed"),
    Mutant("gradients of a sharded model are averaged", "run/processes.py",
           "set_gradient_divide_factor(1.0)", "set_gradient_divide_factor(2.0)", "distributed"),
    Mutant("metrics are not summed over processes", "train.py",
           "    sum_over_processes([sums])\n", "", "distributed"),
    # Found by planting bugs of the kinds that nobody had looked at: what is printed and not used,
    # two sources that disagree, values that are false, several runs, the branches of tools.
    Mutant("a long run's tokens by its steps", "run/plan.py",
           "{sum(tokens) / n_looked_at:.0f} tokens a step",
           "{sum(tokens) / n_steps:.0f} tokens a step", "plan"),
    Mutant("the planned time of one process", "run/plan.py",
           "(1 + again) / rate / world_size()", "(1 + again) / rate", "plan"),
    Mutant("with adapters a third is computed twice", "run/plan.py",
           "(2 if config.lora_rank else 3)", "3", "plan"),
    Mutant("tokens per second of the last step alone", "run/log.py",
           "            self.n_tokens, self.flops = 0, 0\n",
           "        self.n_tokens, self.flops = 0, 0\n", "log"),
    Mutant("time left with evaluations", "run/log.py",
           "self.clock, self.begin = self.clock + pause, self.begin + pause",
           "self.clock += pause", "log"),
    Mutant("added_tokens.json beats tokenizer.json", "formats/tokenizer.py",
           'added = [{"content": text, "id": i} for text, i in more] + added',
           'added += [{"content": text, "id": i} for text, i in more]', "precedence"),
    Mutant("config.json's ends beat generation_config's", "run/saving.py",
           'source.get("eos_token_id") if named is None else named',
           'source.get("eos_token_id", named)', "served"),
    Mutant("messages ask before an instruction", "formats/rows.py",
           '("prompt", "instruction", "question", "messages", "conversations")',
           '("prompt", "messages", "conversations", "instruction", "question")', "precedence"),
    Mutant("a run's day beats --date", "run/folder.py",
           'config.date or then.get("date") or', 'then.get("date") or config.date or', "resume"),
    Mutant("a config's overwrite is about any folder", "run/flags.py",
           '    ("out", "overwrite"),  # which', '    # which', "flags"),
    Mutant("--epochs loses to the file's max_steps", "run/flags.py",
           '("epochs", "max_steps"),\n    ("eval_data"', '("eval_data"', "flags"),
    Mutant("OUT/best comes after its row", "train.py",
           "        save_best(run, row)  # before its row, by which --resume knows that all of "
           "this was done\n        log.evaluation(row)\n",
           "        log.evaluation(row)\n        save_best(run, row)\n", "resume"),
    Mutant("n_inner is ignored", "formats/config.py",
           'values.setdefault("hidden_dim", 4 * found["n_embd"])',
           'values["hidden_dim"] = 4 * found["n_embd"]', "precedence"),
    Mutant("a key that is false is not there", "formats/config.py",
           "for name, key in keys.items() if found.get(key) is not None}",
           "for name, key in keys.items() if found.get(key)}", "families"),
    Mutant("individual_digits is true where it is false", "formats/words.py",
           'if step.get("individual_digits") else', 'if "individual_digits" in step else',
           "tokenizer"),
    Mutant("add_prefix_space is false where it is null", "formats/tokenizer.py",
           'if config.get("add_prefix_space") is False:',
           'if not config.get("add_prefix_space", True):', "tokenizer"),
    Mutant("longrope wants factors for the whole head", "formats/config.py",
           'n = int(head_dim * values.get("rotary_fraction", 1)) // 2', "n = head_dim // 2",
           "families"),
    Mutant("--save-every 0 saves the last step", "train.py",
           "saves = config.save_every and (step == n_steps or due(step, config.save_every))",
           "saves = step == n_steps or due(step, config.save_every)", "flags"),
    Mutant("a base's add_eos_token stays", "formats/tokenizer.py",
           '"add_bos_token": self.bos_id is not None, "add_eos_token": False}',
           '"add_bos_token": self.bos_id is not None}', "served"),
    Mutant("blocks may not be computed twice once a run has begun", "run/flags.py",
           '"micro_batch_tokens", "activation_checkpointing", "compile"),',
           '"micro_batch_tokens", "compile"),', "flags"),
    Mutant("a run of an older version has no defaults", "run/flags.py",
           "before = then.get(name, getattr(TrainConfig, name))", "before = then.get(name)",
           "flags"),
    Mutant("adapters without the bias beside them", "run/lora.py",
           'base.out_features, device="meta")\n        self.weight, self.bias, self.scale = '
           "base.weight, base.bias, alpha / rank\n",
           'base.out_features, bias=False, device="meta")\n        self.weight, self.scale = '
           "base.weight, alpha / rank\n", "lora"),
    Mutant("peft adds GPT-2's adapters untransposed", "run/lora.py",
           '"fan_in_fan_out": family.conv1d', '"fan_in_fan_out": False', "lora"),
    Mutant("lm_head's bias has a prefix", "formats/weights.py",
           'name if name.startswith("lm_head.") else', 'name if name == "lm_head.weight" else',
           "families"),
    Mutant("words are never forgotten", "formats/bpe.py",
           "        if len(self) >= self.most:\n            self.clear()\n", "", "tokenizer"),
    Mutant("shards end behind their limit", "formats/weights.py",
           "and size + n_bytes > shard_bytes:", "and size > shard_bytes:",
           "weights"),
    Mutant("answers' batches are counted in questions", "run/answers.py",
           "n_tokens = min(len(prompts[i]) + max_new, context)", "n_tokens = len(prompts[i])",
           "generation"),
    Mutant("all rows go through lm_head at once", "data.py",
           "_split_sizes(rows, GROUP_ROWS)", "_split_sizes(rows, GROUP_ROWS * len(rows))", "data"),
    Mutant("a vote's turn counts the system message", "tools/forms.py",
           '2 * int(number(row["turn"])) + (dialogues[0][0]["role"] == "system")',
           '2 * int(number(row["turn"]))', "forms"),
    Mutant("two runs of one name are drawn as one", "tools/plot.py",
           "outs = {str(out) if same else out.name:", "outs = {out.name:", "examples"),
    Mutant("a plain dialogue goes on", "tools/sample.py",
           "[*([] if plain else messages), {", "[*messages, {", "examples"),
    Mutant("history in front of the system message", "tools/forms.py",
           "[*prompt[:begins], *turns, *prompt[begins:]]", "[*turns, *prompt]", "forms"),
    Mutant("what comes behind EOS is returned until the host looks", "model.py",
           "tokens = tokens.masked_fill(ended, -1)", "pass", "generation"),
    Mutant("--split takes all rows of a file", "tools/prepare.py",
           "if split in (None, name) or isinstance(row, ValueError):", "if True:", "examples"),
    Mutant("a broken row has no split and is lost", "tools/prepare.py",
           "if split in (None, name) or isinstance(row, ValueError):", "if split in (None, name):",
           "examples"),
    Mutant("a resumed run takes the dtype of its new device", "run/flags.py",
           "if config.resume and config.dtype is None:", "if False:", "flags"),
    Mutant("each machine may have an OUT of its own", "run/folder.py",
           "    if not seen:\n", "    if False:\n", "run_folder"),
    Mutant("adapters name this machine's cache", "run/lora.py",
           "base, revision = name, of_hub[2]", "revision = of_hub[2]", "lora"),
    Mutant("adapters name the newest snapshot of another one", "run/lora.py",
           "if model_folder(name, weights=False).resolve() == base:",
           "if model_folder(name, weights=False):", "lora"),
    Mutant("tokens with equal rows of lm_head are not named", "run/plan.py",
           "if not head[i].any() or (first == first[i]).all(1).sum() > 1]",
           "if not head[i].any()]", "plan"),
    Mutant("a CodeGenTokenizer is handed on", "formats/tokenizer.py",
           'return "GPT2Tokenizer"', "return None", "tokenizer"),
    Mutant("a class that we name gives token_type_ids", "formats/tokenizer.py",
           'changed.setdefault("model_input_names", ["input_ids", "attention_mask"])', "pass",
           "tokenizer"),
    Mutant("other rows' nulls stay in tool calls", "formats/messages.py",
           'without_nulls(more.get("tool_calls"))', 'more.get("tool_calls")', "messages"),
    Mutant("messages that ask nothing are a prompt", "data.py",
           "(asked and not any(map(says, asked)))", "False", "data"),
    Mutant("None is written where there is no content", "formats/tokenizer.py",
           'if any(m.get("content", "") is None for m in messages):', "if False:", "data"),
    Mutant("an empty prompt comes before a question", "formats/rows.py",
           'not in (None, [], "")), None)', "not in (None, [])), None)", "data"),
    Mutant("missing evaluation pairs are blamed on the training file", "run/saving.py",
           "if now != then and NO_PAIRS in (now, then):", "if False:", "resume"),
    Mutant("HelpSteer2's turns are one question", "tools/forms.py",
           'or "<extra_id_1>" not in asked:', "or True:", "forms"),
    # Known to be equivalent: they count apart, and as noticed where a test fails all the same.
    Mutant("log1mexp changes its form at ln 2 itself", "orpo.py",
           "near = y > -math.log(2)", "near = y >= -math.log(2)", "orpo",
           equivalent="at 1 - P = 1/2 both forms have all their digits"),
    Mutant("a token's first copy starts from a larger number", "attention.py",
           "copies.new_full((n,), len(copies))", "copies.new_full((n,), 2 * len(copies))",
           "attention",
           equivalent="every token has a copy, and the least of them counts"),
]
# fmt: on


# ---------------------------------------------------------------------------------------------
# Running them.

LEFT_OUT = (".*", "__pycache__", "out", "*.egg-info", "node_modules")


def planted(mutant: Mutant, root: Path = ROOT) -> str:
    """The source of mutant.file with the bug in it. Raises ValueError where it does not fit."""
    source = (root / mutant.file).read_text(encoding="utf-8")
    if (n := source.count(mutant.old)) != 1:
        raise ValueError(f"{mutant.name}: the old text is {n} times in {mutant.file}, not once")
    return source.replace(mutant.old, mutant.new)


def files_that_notice(mutants: list[Mutant]) -> list[str]:
    """The test files that should notice any of these, each once."""
    return list(dict.fromkeys(f"tests/test_{x}.py" for m in mutants for x in m.tests.split()))


class Result(NamedTuple):
    status: str  # "noticed", "SURVIVED", "TIME LIMIT" or "DOES NOT RUN"
    by: str  # the first test that failed, or the end of what was printed
    seconds: float


# Importing torch takes longer than most of the tests: they run in processes that are forked off one
# that has imported it, and in which nothing of ours has been imported.
FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(
    ["torch.distributed.checkpoint", "torch.distributed.fsdp", "sentencepiece", "jinja2", "pytest"]
)


def pytest_in(tree: Path, files: list[str], printed: Path):
    """What a forked process does; it ends with pytest's exit status."""
    with open(printed, "wb") as f:
        os.dup2(f.fileno(), 1)
        os.dup2(f.fileno(), 2)
    os.chdir(tree)
    # This process knows the package `tests` of the tree that it was started in.
    sys.path = [path for path in sys.path if path not in ("", str(ROOT))]
    for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
        del sys.modules[name]
    import pytest

    options = ["-x", "-q", "-p", "no:cacheprovider", "--tb=no", "-rfE", "-m", "not slow"]
    sys.exit(int(pytest.main([*options, *files])))


def run_tests(tree: Path, files: list[str]) -> Result:
    """These test files until the first failure, in a process of their own."""
    begin, printed = time.time(), tree.parent / "printed"
    process = FORKED.Process(target=pytest_in, args=(tree, files, printed))
    process.start()
    process.join(SECONDS)
    if process.exitcode is None:
        process.kill()
        return Result("TIME LIMIT", "", time.time() - begin)
    text = printed.read_text(encoding="utf-8", errors="replace")
    failed = re.findall(r"^(?:FAILED|ERROR) tests/test_(.+?)(?: - |$)", text, re.M)
    status = {0: "SURVIVED", 1: "noticed"}.get(process.exitcode, "DOES NOT RUN")
    by = failed[0] if failed else " ".join(text[-200:].split())
    return Result(status, "" if status == "SURVIVED" else by, time.time() - begin)


def run_in_a_copy(trees: queue.Queue, files: list[str], mutant: Mutant | None = None) -> Result:
    """The same in a copy of the tree that nobody uses now, with a bug in it or without."""
    tree = trees.get()
    try:
        if mutant is None:
            return run_tests(tree, files)
        file = tree / mutant.file
        source = file.read_bytes()
        file.write_text(planted(mutant, tree), encoding="utf-8")
        try:
            return run_tests(tree, files)
        finally:
            file.write_bytes(source)
    finally:
        trees.put(tree)


def report(mutants: list[Mutant], results) -> bool:
    """Prints a line a bug as it is known, and the score. True where none survives that could be
    noticed."""
    width = max(len(m.name) for m in mutants)
    noticed, survived, equivalent = 0, [], 0
    for mutant, result in zip(mutants, results, strict=True):
        text = result.by if result.status == "noticed" else f"{result.status} {result.by}"
        if result.status == "noticed":
            noticed += 1
        elif mutant.equivalent:
            equivalent += 1
            text += f"(equivalent: {mutant.equivalent})"
        else:
            survived.append(mutant.name)
        print(
            f"{mutant.name:<{width}}  {mutant.file:<13}  {result.seconds:4.0f} s  {text}",
            flush=True,
        )
    print(f"\n{noticed} of {noticed + len(survived)} planted bugs are noticed", end="")
    print(f"; beside them {equivalent} known to be equivalent" if equivalent else "")
    if survived:
        print(f"SURVIVED: {'; '.join(survived)}")
    return not survived


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-k", nargs="+", default=[""], metavar="WORD", help="only these names")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="how many at once")
    parser.add_argument("--list", action="store_true", help="print names and places only")
    args = parser.parse_args()
    mutants = [m for m in MUTANTS if any(word.lower() in m.name.lower() for word in args.k)]
    if not mutants:
        parser.error(f"no name contains {' or '.join(args.k)}")
    if args.list:
        for mutant in mutants:
            print(f"{mutant.file:<13}  {mutant.name}")
        return 0
    begin = time.time()
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"  # bugs planted within a second would share a .pyc
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.jobs) as pool:
        trees = queue.Queue()
        for i in range(min(args.jobs, len(mutants))):
            tree = Path(folder) / str(i) / ROOT.name
            shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(*LEFT_OUT))
            trees.put(tree)
        files = files_that_notice(mutants)
        passes = pool.map(lambda file: run_in_a_copy(trees, [file]), files)
        for file, result in zip(files, passes, strict=True):
            if result.status != "SURVIVED":
                print(f"{file} does not pass without a bug: {result.by}", file=sys.stderr)
                return 2
        print(f"{len(files)} test files pass without a bug: {time.time() - begin:.0f} s\n")
        results = pool.map(lambda m: run_in_a_copy(trees, files_that_notice([m]), m), mutants)
        good = report(mutants, results)
    print(f"{time.time() - begin:.0f} s, {args.jobs} at once")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
