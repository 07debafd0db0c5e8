"""A language model of bytes in plain PyTorch: ``python transformer.py text.txt`` trains it and lets it write."""

import argparse
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F


class Block(nn.Module):
    def __init__(self, features, heads):
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(features), nn.LayerNorm(features)
        self.qkv, self.out = nn.Linear(features, 3 * features), nn.Linear(features, features)
        self.mlp = nn.Sequential(nn.Linear(features, 4 * features), nn.GELU(), nn.Linear(4 * features, features))

    def forward(self, x, cache=None):
        q, k, v = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if cache is not None:
            k, v = torch.cat((cache[0], k), 2), torch.cat((cache[1], v), 2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=cache is None)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.mlp(self.mlp_norm(x)), (k, v)


class Transformer(nn.Module):
    def __init__(self, features=128, layers=4, heads=4, length=128):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(256, features), nn.Embedding(length, features)
        self.blocks = nn.ModuleList(Block(features, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(features), nn.Linear(features, 256)

    def forward(self, tokens, caches=None):
        """Logits and caches; given the caches of the tokens before, ``tokens`` is one token of each sequence."""
        start = 0 if caches is None else caches[0][0].shape[2]
        embeddings = self.tokens(tokens)
        x, new = embeddings + self.positions.weight[start : start + tokens.shape[1]], []
        for block, cache in zip(self.blocks, caches or [None] * len(self.blocks), strict=True):
            x, cache = block(x, cache)
            new.append(cache)
        return self.head(self.norm(x)), new


def loss_of(model, windows):
    return F.cross_entropy(model(windows[:, :-1])[0].flatten(0, 1), windows[:, 1:].flatten())


@torch.no_grad()
def evaluate(model, data, length):
    windows = data[: (len(data) - 1) // length * length + 1].unfold(0, length + 1, length)
    return sum(loss_of(model, part).item() * len(part) for part in windows.split(64)) / len(windows)


@torch.no_grad()
def generate(model, tokens, count):
    new, caches = tokens, None
    for _ in range(count):
        logits, caches = model(new, caches)
        new = logits[:, -1].softmax(-1).multinomial(1)
        tokens = torch.cat((tokens, new), 1)
    return tokens


def main(arguments=None):
    parser = argparse.ArgumentParser()
    parser.add_argument("text", type=Path)
    for name, default in {"steps": 1000, "batch": 16, "length": 128, "seed": 0}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args(arguments)
    torch.manual_seed(args.seed)
    data = torch.frombuffer(bytearray(args.text.read_bytes()), dtype=torch.uint8).long()
    size = min(len(data) // 10, 100_000)
    train, held_out = data.split([len(data) - size, size])
    model = Transformer(length=args.length)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    batches = torch.Generator().manual_seed(args.seed)
    for step in range(1, args.steps + 1):
        starts = torch.randint(len(train) - args.length, (args.batch, 1), generator=batches)
        loss = loss_of(model, train[starts + torch.arange(args.length + 1)])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 250 == 0 or step == args.steps:
            model.eval()
            print(f"step {step}: validation loss {evaluate(model, held_out, args.length):.4f} nats per byte")
            model.train()
    written = generate(model.eval(), held_out[None, :32], args.length - 32)
    print(bytes(written[0].tolist()).decode(errors="replace"))


if __name__ == "__main__":
    main()
