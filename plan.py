"""How a batch is cut into passes; what a run will be, from config.json alone: parameters, steps, tokens, memory (train.py --dry-run)."""

import bisect
import math
from pathlib import Path

import torch

import model as backbone
from crosslora import CrossLoRA
from data import LANGUAGES, Tokenizer, encode, read_stage_data, target_count
from files import UserError, resolve
from kernels import AT_LEAST, LOGITS


def pass_tokens(args, cfg, device):
    """--micro-batch-tokens, or its default: "cuda" takes what --micro-batch-size rows of --max-length hold, "cpu" what its caches do,
    but enough for reading a weight from memory, once a pass, to be little beside the products."""
    if args.micro_batch_tokens is not None:
        return args.micro_batch_tokens
    return args.micro_batch_size * args.max_length if device == "cuda" else max(384, 2**20 // cfg.intermediate_size)


def micro_batches(rows, args):
    """Cut `rows` into one rank's passes: as few as hold at most --micro-batch-tokens tokens each (a longer row has a pass of its
    own), as even as these can be, or --micro-batch-size rows each where that is 0."""
    if not args.micro_batch_tokens:
        return [rows[i : i + args.micro_batch_size] for i in range(0, len(rows), args.micro_batch_size)]

    def cut(most):
        passes, room = [], 0
        for row in rows:
            if len(row.ids) > room:
                passes.append([])
                room = most
            passes[-1].append(row)
            room -= len(row.ids)
        return passes

    limits = range(args.micro_batch_tokens + 1)
    fewest = len(cut(limits[-1]))
    return cut(bisect.bisect_left(limits, True, key=lambda most: len(cut(most)) == fewest))  # the least limit that needs no more passes


def saved_bytes(cfg, rows, tokens, targets, element):
    """Estimate of what one micro-batch keeps for its backward pass, in bytes: `rows` (R-Drop's copies included) of
    `tokens` each, `targets` in all, activations of `element` bytes.

    A layer keeps two norm inputs and what makes fp32 of them (at most), attention's q, k, v and output, the inputs of three LoRA branches
    (on a GPU dropped ones, on a CPU two are one) with their masks, and SwiGLU's two factors; the last layer keeps for all tokens what it
    has up to its attention, the rest for targets; frozen projections keep nothing. The loss keeps a gradient of its states.
    """
    D, F_, heads = cfg.hidden_size, cfg.intermediate_size, 2 * (cfg.num_attention_heads + cfg.num_key_value_heads) * cfg.head_dim
    layer = D * (2 * 4 + 2 * (1 + element)) + heads * element + F_ * (2 * element + 1 + element)
    last = D * 4 + heads * element
    return rows * tokens * ((cfg.num_hidden_layers - 1) * layer + last) + targets * (layer + D * element)


def dry_run(args):
    """Print what a run would be, from config.json alone and, where they are, tokenizer and data: no weights are read.
    Without prepared data (in Stage 2: without --pseudo) it counts Table 5's pairs."""
    folder, _ = resolve(args.model, ["config.json", "tokenizer.json"])
    cfg = backbone.Config.load(folder)
    languages, examples, source = list(LANGUAGES), None, "Table 5"
    if (Path(args.data) / "manifest.json").exists() and (args.stage == 1 or args.pseudo):
        languages, rows, _, _ = read_stage_data(args)
        pairs, source = len(rows), args.data
        if (folder / "tokenizer.json").exists():
            examples, dropped = encode(Tokenizer(folder, cfg, args.prompt_format), rows, args.max_length)
            pairs = len(examples)
            if not examples:
                raise UserError(f"{args.data}: no training pair fits --max-length {args.max_length}")
    else:
        pairs = 10 * 20997 + (20 * 18997 if args.stage == 2 else 0)
    with torch.device("meta"):
        adapter = CrossLoRA(cfg, languages, args.rank, args.alpha, args.dropout, args.adapter_type, args.groups, args.top_k)
    size = lambda module: sum(p.numel() for p in module.parameters())
    frozen, trained = size(backbone.build(cfg)), size(adapter)
    steps = math.ceil(pairs / args.batch_size)
    print(f"backbone:   {frozen:,} parameters, frozen")
    print(f"adapter:    {trained:,} parameters, trained: {trained / frozen:.2%} of the backbone, "
          f"{trained / (frozen + trained):.2%} of the total")
    print(f"steps:      {steps:,} an epoch, {min(args.epochs * steps, args.max_steps or math.inf):,} in all; "
          f"{pairs:,} pairs ({source}) in batches of {args.batch_size}")
    if examples is None:
        print("tokens:     unknown without --data from data.py and the checkpoint's tokenizer.json")
        length, targets = args.max_length, args.max_length // 2
    else:
        lengths, counts = [len(e.ids) for e in examples], [target_count(e) for e in examples]
        length, targets = max(lengths), max(counts)  # the worst pass is all long ones
        print(f"tokens:     {sum(lengths):,} an epoch, {sum(counts):,} of them targets; {sum(lengths) / pairs:.1f} a pair, "
              f"longest {length}; {dropped} pairs dropped")
    passes = 2 if args.rdrop_alpha > 0 else 1
    # CausalLM.pack: transposes of all but the embeddings; of a tied head both.
    packed = frozen + (1 if cfg.tie_word_embeddings else -1) * cfg.vocab_size * cfg.hidden_size
    for what, element, device, weights, copied in (("bf16 backbone (GPU)", 2, "cuda", frozen, trained),
                                                   ("fp32 backbone (CPU)", 4, "cpu", frozen + packed, 0)):
        rows = args.micro_batch_size
        if tokens := pass_tokens(args, cfg, device):  # what fits, rounded up: somewhat shorter rows use the tokens to the last
            rows = min(math.ceil(max(1, tokens / length)), args.batch_size)
        # fp32 weight, gradient and two moments are 16 bytes a trained parameter; a GPU copies the experts that are present; beside the
        # logits that are there at one time the loss holds about three fp32 copies of them
        logits = min(max(LOGITS[device], AT_LEAST * cfg.vocab_size), rows * passes * targets * cfg.vocab_size)
        activations = saved_bytes(cfg, rows * passes, length, rows * passes * targets, element) + logits * (3 * 4 + element)
        parts = [n / 2**30 for n in (weights * element, 16 * trained, copied * element, activations)]
        print(f"memory:     at most {sum(parts):.1f} GiB a process, {what}: weights {parts[0]:.1f}, adapter with gradient and Adam "
              f"{parts[1]:.1f}, copied experts {parts[2]:.1f}, activations {parts[3]:.1f} ({rows} pairs of {length} tokens)")
