"""Compare our reading with transformers' generate on models of trocr-base's size with random weights.

    python scripts/parity_trocr.py --work FOLDER [--seeds 3] [--lines 8] [--tokens 24]

Two kinds: learned positions and a head tied to the word vectors, as the handwritten and printed checkpoints have, and
sinusoidal positions and a head of its own, as stage1 has. The weights are drawn so wide that tokens differ clearly and
lines end at different steps; with transformers' own narrow ones every token is equally likely. Both get the same
pixels.

Ends with 1 when a line differs: greedy in its tokens, unless its two best tokens were once within 1e-5; with beams
unless the lines' scores are within 1e-5; or in any log-probability by more than 1e-4, or an embedding by more than 1e-5
of the largest. FOLDER needs 1.7 GB.
"""

import argparse
import math
from pathlib import Path
from typing import Any

KINDS = ("learned positions, tied", "sinusoidal positions, untied")
TIE, SCORES, EMBEDDINGS = 1e-5, 1e-4, 1e-5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for one model")
    parser.add_argument("--seeds", type=int, default=3, help="models of each kind (default: 3)")
    parser.add_argument("--lines", type=int, default=8, help="pictures for each (default: 8)")
    parser.add_argument("--tokens", type=int, default=24, help="tokens a line may have (default: 24)")
    parser.add_argument("--geometry", default="base", help="base, or tiny for a try")
    arguments = parser.parse_args()
    print("| model | seed | beams | lines the same | ties | lengths | log-probabilities differ by | embeddings by |")
    print("|---|---:|---:|---:|---:|---|---:|---:|")
    good = True
    for kind in KINDS:
        for seed in range(1, arguments.seeds + 1):
            folder = write_model(arguments.work / "model", arguments.geometry, kind, seed)
            good &= all(compare(folder, kind, seed, beams, arguments) for beams in (1, 4))
    if not good:
        raise SystemExit("There are differences.")


def write_model(folder: Path, geometry: str, kind: str, seed: int) -> Path:
    """A checkpoint of one kind, in the form they are published in; the last one's place is taken."""
    import torch
    import transformers

    from fastsd_helpers.bench.trocr import write_random_reader

    if not (folder / "preprocessor_config.json").is_file():
        write_random_reader(folder, geometry)
    config = transformers.VisionEncoderDecoderConfig.from_pretrained(folder)
    learned = kind == KINDS[0]
    config.decoder.use_learned_position_embeddings = config.decoder.layernorm_embedding = learned
    config.decoder.tie_word_embeddings = config.tie_word_embeddings = learned
    config.decoder.scale_embedding, config.decoder.activation_function = not learned, "gelu" if learned else "relu"
    torch.manual_seed(seed)
    model = transformers.VisionEncoderDecoderModel(config=config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                # What is seen and where the line is at must count for more than the token before, or all lines loop.
                more = 2 if "encoder_attn" in name or "embed_positions" in name else 1
                weight.normal_(0, more * 1.4 / math.sqrt(weight[0].numel()))
        model.decoder.output_projection.weight[2] *= 8.0
    model.generation_config = transformers.GenerationConfig(
        decoder_start_token_id=2, eos_token_id=2, pad_token_id=1, use_cache=False
    )
    model.save_pretrained(folder)
    return folder


def compare(folder: Path, kind: str, seed: int, beams: int, arguments: argparse.Namespace) -> bool:
    """Read the same pictures both ways, print a row, and say whether nothing differs that should not."""
    import numpy as np
    import torch

    from fastsd_helpers.trocr import Reader

    pictures = noise_pictures(arguments.lines, seed)
    reader = Reader(
        folder, beams=beams, precision="fp32", device="cpu", max_new_tokens=arguments.tokens, loop_guard=False,
        batch_size=max(1, arguments.lines // 2 + 1),
    )  # fmt: skip
    ours = reader.read(pictures)
    checkpoint = reader.checkpoint
    pixels = checkpoint.pixels.batch([checkpoint.pixels.resize(picture) for picture in pictures])
    expected = theirs(checkpoint.model, pixels, beams, arguments.tokens)
    same = ties = wrong = 0
    furthest = 0.0
    for line, (ids, logs, gap) in zip(ours, expected, strict=True):
        found = [math.log(token.confidence) for token in line.tokens]
        if [token.id for token in line.tokens] == ids:
            same += 1
            furthest = max([furthest, *(abs(a - b) for a, b in zip(found, logs, strict=False))])
            mean = sum(logs) / len(logs)
            furthest = max(furthest, abs(math.log(line.confidence) - mean))
        elif (gap if beams == 1 else abs(math.log(line.confidence) - sum(logs) / len(logs))) < TIE:
            ties += 1
        else:
            wrong += 1
    with torch.inference_mode():
        hidden = checkpoint.model.encoder(pixels).last_hidden_state.numpy()
    away = float(np.abs(reader.embed(pictures, "none") - hidden).max() / np.abs(hidden).max())
    lengths = sorted({len(line.tokens) for line in ours})
    print(f"| {kind} | {seed} | {beams} | {same} of {len(ours)} | {ties} | {lengths[0]} to {lengths[-1]} "
          f"| {furthest:.1e} | {away:.1e} |", flush=True)  # fmt: skip
    return not wrong and furthest <= SCORES and away <= EMBEDDINGS


def theirs(model: Any, pixels: Any, beams: int, limit: int) -> list[tuple[list[int], list[float], float]]:
    """transformers' generate: tokens without start and end, log-probabilities, the narrowest gap of the best two."""
    import torch
    import transformers

    settings = transformers.GenerationConfig(
        max_new_tokens=limit, num_beams=beams, use_cache=True, decoder_start_token_id=2, eos_token_id=2,
        pad_token_id=1, return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    with torch.inference_mode():
        out = model.generate(pixels, generation_config=settings)
    found = []
    for row, sequence in enumerate(out.sequences[:, 1:].tolist()):
        ids = sequence[: sequence.index(2)] if 2 in sequence else sequence
        count = min(len(ids) + 1, len(out.scores))
        gap = 0.0
        if beams == 1:
            # compute_transition_scores adds 50,000 fp32 exponentials one by one, which is off by up to 4e-4.
            steps = torch.stack([step[row] for step in out.scores[:count]]).double().log_softmax(-1)
            best = steps.topk(2).values
            gap = float((best[:, 0] - best[:, 1]).min())
            logs = steps[torch.arange(count), torch.tensor(sequence[:count])].tolist()
        else:
            logs = model.compute_transition_scores(out.sequences, out.scores, out.beam_indices)[row, :count].tolist()
        found.append((ids, logs, gap))
    return found


def noise_pictures(count: int, seed: int) -> list[Any]:
    """Pictures of random patches, unlike one another."""
    import numpy as np
    from PIL import Image

    chance = np.random.default_rng(seed)
    return [
        Image.fromarray(chance.integers(0, 256, (6, int(chance.integers(8, 40)), 3), dtype=np.uint8)).resize((384, 96))
        for _ in range(count)
    ]


if __name__ == "__main__":
    main()
