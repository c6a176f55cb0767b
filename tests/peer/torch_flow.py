"""TarFlow and STARFlow in eager PyTorch: the yardstick for values and for time.

    python tests/peer/torch_flow.py --row sample_starflow --batch 8

The published programs are not part of this repository. This file is our own writing of the same
computation, with their parameter names, and it calls the same torch operations in the same order,
their slow paths included: so it gives values for every combination of options, and stands in for
them where both sides are timed on one machine. What it leaves out (einops and tqdm calls, the
all-reduce of Jacobi on one process) is overhead, so a ratio against it is not flattering to us.

Tokens are [B, T, D] in raster order; text is [B, L, E]; options use the published vocabulary.
"""

import argparse
import json
import resource
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).parents[1]))  # for `peer` where this runs as a script

from peer.torch_layers import (
    FilledCache,
    JoinedCache,
    Layer,
    OffsetRMSNorm,
    parse,
    rope_angles,
    widen,
)

UNIT_SOFTPLUS = 0.541324854612918  # softplus of this is 1


class Block(nn.Module):
    def __init__(self, o, index):
        super().__init__()
        self.o, self.top = o, index == o.num_blocks - 1
        odd = index % 2 == 1
        self.flip = odd if o.tarflow or o.seq_order == "R2L" else not odd
        self.reads_text = o.txt_dim > 0 and (self.top or not o.cond_top_only)
        width = (o.top_block_channels or o.channels) if self.top else o.channels
        self.proj_in = nn.Linear(o.token_width, width)
        self.proj_out = nn.Linear(width, 2 * o.token_width)
        nn.init.zeros_(self.proj_out.weight)
        if o.sos:
            self.sos_embed = nn.Parameter(torch.randn(1, 1, o.token_width))
        if not o.rope:
            self.pos_embed = nn.Parameter(torch.randn(o.side**2, width) * 1e-2)
        if o.num_classes:
            self.class_embed = nn.Parameter(torch.randn(o.num_classes, 1, width) * 1e-2)
        if self.reads_text:
            self.proj_txt = nn.Linear(o.txt_dim, width)
        self.attn_blocks = nn.ModuleList(Layer(width, o) for _ in range(o.depths[index]))
        if o.use_final_norm:
            self.final_norm = OffsetRMSNorm(width)
        length = o.side**2 if o.tarflow else o.trained_side**2 + o.txt_size
        self.register_buffer("attn_mask", torch.tril(torch.ones(length, length)))

    def ordered(self, x, dim=1):
        return x.flip(dims=[dim]) if self.flip else x.clone()

    def positions(self):
        return None if self.o.rope else self.ordered(self.pos_embed, dim=0)

    def class_vector(self, labels):
        null = self.class_embed.mean(dim=0)
        if labels is None:
            return null
        known = self.class_embed[labels.clamp(min=0)]
        return torch.where((labels < 0).view(-1, 1, 1), null, known)

    def embed(self, x, place, labels):
        h = self.proj_in(x)
        h = h if place is None else h + place
        return h + self.class_vector(labels) if self.o.num_classes else h

    def stack(self, h, text, *call):
        for layer, module in enumerate(self.attn_blocks):
            h, text = module(h, text, layer, *call)
        return h, text

    def head(self, h):
        """[B, t, 2D]: the number the scale is made of, then the mean."""
        out = self.proj_out(self.final_norm(h) if self.o.use_final_norm else h)
        return self.o.soft_clip * torch.tanh(out / self.o.soft_clip) if self.o.soft_clip else out

    def scale_and_mean(self, out):
        raw, mean = out.chunk(2, dim=-1)
        raw, mean = widen(raw), widen(mean)
        scale = functional.softplus(raw + UNIT_SOFTPLUS) if self.o.use_softplus else raw.exp()
        return scale, mean

    def angles(self, like, text, grid):
        length = text.size(1) if self.reads_text else 0
        return rope_angles(self.o, grid, length, like) if self.o.rope else None

    def forward(self, x, text, labels, grid):
        """-> z and log_det per element, the latter in the block's own order."""
        angles = self.angles(x, text, grid)
        x = self.ordered(x)
        fed = torch.cat([self.sos_embed.expand(len(x), -1, -1), x[:, :-1]], 1) if self.o.sos else x
        h = self.embed(fed, self.positions(), labels)
        prefix = self.proj_txt(text) if self.reads_text else None
        mask = self.attn_mask if self.o.tarflow else None
        out = self.head(self.stack(h, prefix, angles, None, mask)[0])
        if not self.o.sos:
            out = torch.cat([torch.zeros_like(out[:, :1]), out[:, :-1]], dim=1)
        if self.o.tarflow:
            raw, mean = out.chunk(2, dim=-1)
            return self.ordered((x - mean) * widen(-raw).exp().type(raw.dtype)), -raw
        scale, mean = self.scale_and_mean(out)
        return self.ordered((widen(x) - mean) / scale).to(out.dtype), -torch.log(scale)

    def sample_tarflow(self, z, labels, guidance, what, annealed, temperature):
        """One token at a time; guidance is a second pass of batch B with a cache of its own."""
        x, place = self.ordered(z), self.positions()
        caches, steps = (JoinedCache(), JoinedCache()), z.size(1) - 1

        def predict(i, labels, cache, temperature):
            h = self.embed(x[:, i : i + 1], place[i : i + 1], labels)
            out = self.head(self.stack(h, None, None, cache, None, temperature)[0])
            return out.chunk(2, dim=-1)

        for i in range(steps):
            raw, mean = predict(i, labels, caches[0], 1.0)
            if guidance:
                raw_null, mean_null = predict(i, None, caches[1], temperature)
                weight = guidance * (i + 1) / steps if annealed else guidance
                raw = raw + weight * (raw - raw_null) if "a" in what else raw
                mean = mean + weight * (mean - mean_null) if "b" in what else mean
            scale = widen(raw[:, 0]).exp().type(raw.dtype)
            x[:, i + 1] = x[:, i + 1] * scale + mean[:, 0]
        return self.ordered(x)

    def start_sampling(self, z, text, grid, guided, temperature=1.0):
        angles = self.angles(widen(z), text, grid)
        z = self.ordered(torch.cat([widen(z)] * 2) if guided else widen(z))
        length = z.size(1) + (text.size(1) if self.reads_text else 0)
        attention = self.attn_blocks[0].attention
        cache = FilledCache(
            len(self.attn_blocks), len(z), attention.kv_heads, length, self.o.head_dim, z
        )
        if self.reads_text:
            self.stack(self.proj_txt(text), None, angles, cache, None, temperature)
        return z, angles, cache

    def sample_starflow(self, z, text, grid, guidance, temperature):
        """One token at a time; guidance doubles the batch, `text` being [conditional; null]."""
        z, angles, cache = self.start_sampling(z, text, grid, guidance > 0, temperature)
        x, place, late = z.clone(), self.positions(), 0 if self.o.sos else 1
        for step in range(z.size(1) - late):
            t = step + late
            previous = x[:, t - 1 : t] if t else self.sos_embed.expand(len(x), -1, -1)
            h = self.proj_in(previous.to(self.proj_in.weight.dtype))
            h = h if place is None else h + place[step : step + 1]
            out = self.head(self.stack(h, None, angles, cache, None, temperature)[0])
            scale, mean = (part.squeeze(1) for part in self.scale_and_mean(out))
            if guidance:
                scale, mean = guided_gaussian(scale, mean, guidance)
            x[:, t] = z[:, t] * scale + mean
        return self.ordered(x.chunk(2)[0] if guidance else x)

    def jacobi(self, z, text, grid, guidance, size, threshold, limit=32):
        """Block-wise fixed-point iteration; -> x and the number of forward passes."""
        z, angles, cache = self.start_sampling(z, text, grid, guidance > 0)
        x, passes = torch.cat([self.sos_embed.expand(len(z), -1, -1), z], dim=1), 0
        for start in range(0, z.size(1), size):
            end = min(start + size, z.size(1))
            for last in range(limit - 1, -1, -1):
                h = self.proj_in(x[:, start:end].to(self.proj_in.weight.dtype))
                scale, mean = self.scale_and_mean(self.head(self.stack(h, None, angles, cache)[0]))
                if guidance:
                    scale, mean = guided_gaussian(scale, mean, guidance)
                new = mean + scale * z[:, start:end]
                change = ((new - x[:, start + 1 : end + 1]) ** 2).mean() / (new**2).mean()
                x[:, start + 1 : end + 1] = new
                passes += 1
                if last == 0 or bool(change < threshold):
                    break
                cache.rewind(end - start)
        return self.ordered((x.chunk(2)[0] if guidance else x)[:, 1:]), passes


def guided_gaussian(scale, mean, weight):
    """p_cond^(1+w) p_null^(-w) as a Gaussian, the scale ratio held to at most 1; both halves."""
    (scale_c, scale_n), (mean_c, mean_n) = scale.chunk(2), mean.chunk(2)
    share = weight * (scale_c / scale_n).clip(max=1.0).square()
    total = 1 + weight - share
    scale, mean = scale_c / total.sqrt(), ((1 + weight) * mean_c - share * mean_n) / total
    return torch.cat([scale, scale]), torch.cat([mean, mean])


class Flow(nn.Module):
    """Either family, its state_dict under the published names, dead buffers included."""

    def __init__(self, options: dict):
        super().__init__()
        self.o = o = parse(options)
        self.blocks = nn.ModuleList(
            Block(o, i) if o.depths[i] else nn.Identity() for i in range(o.num_blocks)
        )
        side = o.side if o.tarflow else o.trained_side
        self.register_buffer("var", torch.ones(side**2, o.token_width))
        if o.rope:
            self.feat_rope, dead = nn.Module(), torch.zeros(o.txt_size + side**2, o.head_dim)
            self.feat_rope.register_buffer("freqs_cos", dead)
            self.feat_rope.register_buffer("freqs_sin", dead)

    def patchify(self, image: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] -> [B, T, D]; D is (c, row, col) in TarFlow, (row, col, c) in STARFlow."""
        batch, channels, height, width = image.shape
        p = self.o.patch_size
        cells = image.reshape(batch, channels, height // p, p, width // p, p)
        axes = (0, 2, 4, 1, 3, 5) if self.o.tarflow else (0, 2, 4, 3, 5, 1)
        return cells.permute(axes).reshape(batch, -1, self.o.token_width)

    def unpatchify(self, tokens: torch.Tensor, grid=None) -> torch.Tensor:
        """[B, T, D] -> [B, C, H, W]."""
        rows, columns = self.grid(grid)
        p, c = self.o.patch_size, self.o.in_channels
        shape = (c, p, p) if self.o.tarflow else (p, p, c)
        axes = (0, 3, 1, 4, 2, 5) if self.o.tarflow else (0, 5, 1, 3, 2, 4)
        cells = tokens.reshape(len(tokens), rows, columns, *shape).permute(axes)
        return cells.reshape(len(tokens), c, rows * p, columns * p)

    def grid(self, grid=None):
        return tuple(grid) if grid is not None else (self.o.side, self.o.side)

    def forward(self, x, text=None, labels=None, grid=None):
        """Tokens -> (outputs, log_dets): [x, after block 0, ..., z] and one [B, T, D] a block."""
        outputs, log_dets = [x], []
        for block in self.blocks:
            if isinstance(block, Block):
                x, log_det = block(x, text, labels, self.grid(grid))
                log_dets.append(log_det)
            outputs.append(x)
        return outputs, log_dets

    def loss(self, outputs, log_dets) -> torch.Tensor:
        """Mean over rows, tokens and channels, in nats, without the constant."""
        z = outputs[-1]
        if self.o.tarflow:
            return 0.5 * z.pow(2).mean() - sum(d.mean(dim=[1, 2]) for d in log_dets).mean()
        per_row = 0.5 * z.pow(2).mean(dim=(1, 2)) - sum(d.mean(dim=(1, 2)) for d in log_dets)
        return per_row.mean()

    @torch.no_grad()
    def sample(
        self, noise, text=None, labels=None, grid=None, guidance=0.0, null_text=None,
        what="ab", annealed=False, temperature=1.0, jacobi=None,
    ) -> tuple[list[torch.Tensor], int]:  # fmt: skip
        """Noise tokens -> ([noise, after the top block, ..., x], forward passes of Jacobi).

        `jacobi` is (block size, threshold). `null_text` [1 or B, L, E] is for guided STARFlow.
        """
        x, states, passes, grid = noise, [noise], 0, self.grid(grid)
        if guidance and not self.o.tarflow:
            text = torch.cat([text, null_text.expand_as(text)])
        x = x * self.var.sqrt() if self.o.tarflow else x
        for block in reversed(self.blocks):
            if isinstance(block, nn.Identity):
                states.append(x)
                continue
            if guidance and not self.o.tarflow and self.o.cond_top_only and not block.top:
                guidance = 0.0
            if self.o.tarflow:
                x = block.sample_tarflow(x, labels, guidance, what, annealed, temperature)
            elif jacobi is None:
                x = block.sample_starflow(x, text, grid, guidance, temperature)
            else:
                x, count = block.jacobi(x, text, grid, guidance, *jacobi)
                passes += count
            states.append(x)
        return states, passes


def reference(
    options: dict, seed: int, *, batch=2, grid=None, text_length=None, guidance=1.5
) -> dict[str, np.ndarray]:
    """A random float64 model of these options, run both ways; everything as numpy arrays.

    Weights and inputs are multiples of 1/64: exact in float32. Keys: `params/<name>`; `x`,
    `noise`, `z`, `sample` [B, T, D]; `x_image`, `z_image`, `sample_image` [B, C, H, W]; `log_det`
    [B] (sum in nats); `loss` (mean in nats, no constant), `grad_x`; `grid` (rows, columns); where
    the options have them `text` [B, L, E], `null_text` [1, L, E], `labels` [B], and then
    `guidance` and `sample_guided` (against the null text or the null class).
    """
    flow, draw = Flow(options).double(), np.random.default_rng(seed)
    grid = flow.grid(grid)
    for name, weight in flow.named_parameters():
        owner, _, leaf = name.rpartition(".")
        centre = isinstance(flow.get_submodule(owner), nn.LayerNorm) and leaf == "weight"
        vector = weight.dim() == 1 or leaf.endswith("embed")
        spread = 0.2 if vector else 0.6 * weight.size(-1) ** -0.5
        value = centre + spread * draw.standard_normal(weight.shape)
        weight.data = torch.from_numpy(np.round(value * 64) / 64)
    shape = (batch, grid[0] * grid[1], flow.o.token_width)
    normal = lambda *shape: torch.from_numpy(np.round(64 * draw.standard_normal(shape)) / 64)
    x, noise, call, guided = normal(*shape).requires_grad_(), normal(*shape), {"grid": grid}, {}
    if flow.o.txt_dim:
        length = text_length or flow.o.txt_size
        call["text"] = normal(batch, length, flow.o.txt_dim)
        guided = {"null_text": normal(1, length, flow.o.txt_dim)}
    if flow.o.num_classes:
        call["labels"] = torch.from_numpy(draw.integers(0, flow.o.num_classes, batch))
    outputs, log_dets = flow(x, **call)
    loss = flow.loss(outputs, log_dets)
    (grad,) = torch.autograd.grad(loss, x)
    sample = flow.sample(noise, **call)[0][-1]
    arrays = dict(x=x, noise=noise, z=outputs[-1], sample=sample, loss=loss, grad_x=grad)
    arrays |= {f"{k}_image": flow.unpatchify(arrays[k], grid) for k in ("x", "z", "sample")}
    arrays["log_det"] = sum(d.sum(dim=(1, 2)) for d in log_dets)
    arrays |= {k: v for k, v in call.items() if k != "grid"} | guided
    if guided or flow.o.num_classes:
        states, _ = flow.sample(noise, **call, **guided, guidance=guidance)
        arrays |= {"sample_guided": states[-1], "guidance": torch.tensor(guidance)}
    arrays |= {f"params/{name}": value for name, value in flow.state_dict().items()}
    return {k: v.detach().numpy() for k, v in arrays.items()} | {"grid": np.asarray(grid)}


TIMED = {
    "tarflow": dict(in_channels=3, img_size=32, patch_size=2, channels=256, num_blocks=4,
                    layers_per_block=4, nvp=1),
    "starflow": dict(in_channels=16, img_size=16, patch_size=1, channels=512, num_blocks=4,
                     layers_per_block=[2, 2, 2, 8], head_dim=64, rope=1, sos=1, txt_size=32,
                     txt_dim=768, cond_top_only=1, use_softplus=1, use_final_norm=1, soft_clip=4,
                     seq_order="L2R"),
}  # fmt: skip


def prepare_row(row: str, batch: int, guidance: float, jacobi: bool):
    """The model and the function of no arguments that one repeat of a row runs."""
    task, family = row.split("_")
    torch.manual_seed(0)
    classes = {"num_classes": 10} if family == "tarflow" and guidance else {}
    flow = Flow(TIMED[family] | classes)
    for block in flow.blocks:
        nn.init.normal_(block.proj_out.weight, std=0.005)
    call = {"text": torch.randn(batch, flow.o.txt_size, flow.o.txt_dim)} if flow.o.txt_dim else {}
    if classes:
        call["labels"] = torch.randint(10, (batch,))
    if task == "sample":
        noise = torch.randn(batch, flow.o.side**2, flow.o.token_width)
        call |= {"guidance": guidance, "jacobi": (16, 1e-3) if jacobi else None}
        if guidance and family == "starflow":
            call["null_text"] = torch.zeros_like(call["text"][:1])
        return flow, lambda: flow.unpatchify(flow.sample(noise, **call)[0][-1])
    image = torch.randn(batch, flow.o.in_channels, flow.o.img_size, flow.o.img_size)
    optimizer = torch.optim.AdamW(
        flow.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=1e-4, foreach=False
    )

    def step():
        optimizer.zero_grad()
        flow.loss(*flow(flow.patchify(image), **call)).backward()
        optimizer.step()

    return flow, step


def main():
    rows = [f"{task}_{family}" for task in ("train", "sample") for family in TIMED]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--row", required=True, choices=rows)
    parser.add_argument("--batch", type=int, help="default 8 and 4 in training, 1 in sampling")
    parser.add_argument("--guidance", type=float, default=0.0)
    parser.add_argument("--jacobi", action="store_true", help="blocks summarize 16, threshold 1e-3")
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    if args.jacobi and args.row != "sample_starflow":
        parser.error(f"--jacobi is for sample_starflow, not {args.row}")
    torch.set_num_threads(2)
    training = args.row.startswith("train")
    batch = args.batch or {"train_tarflow": 8, "train_starflow": 4}.get(args.row, 1)
    flow, repeat = prepare_row(args.row, batch, args.guidance, args.jacobi)
    times = []
    for _ in range((3 if training else 2) + args.repeats):
        start = time.perf_counter()
        repeat()
        times.append(1000 * (time.perf_counter() - start))
    times = times[-args.repeats :]
    row = vars(args) | {"batch": batch, "torch": torch.__version__}
    row["parameters"] = sum(p.numel() for p in flow.parameters())
    for name, summarize in (("median", statistics.median), ("min", min), ("max", max)):
        row[f"{name}_ms"] = round(summarize(times), 1)
    row["tokens_per_s"] = round(batch * flow.o.side**2 / row["median_ms"] * 1000, 1)
    row["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(json.dumps(row))


if __name__ == "__main__":
    main()
