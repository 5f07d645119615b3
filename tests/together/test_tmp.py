import contextlib
import io

import torch
import torch.distributed as dist
from run_training import Runs, same_bits
from test_together import ADALORA, DORA, FSDP2, PLAIN
from together_runs import (
    Together,
    crashed_together,
    in_pass,
    train_together,
    words_alone,
)

EIGHT = {"name": "eight", "adapter": {"r": 8}, "optimizer": {"name": "adamw8bit", "lr": 1e-3}}
SGD = {
    "name": "sgd",
    "adapter": {"r": 3},
    "optimizer": {"name": "sgd", "lr": 1e-1},
    "train": {"max_steps": 6},
}


def healed(argv):
    printed = io.StringIO()

    def meddle(run):
        def act():
            if dist.get_rank() == 1:
                p = next(iter(run.members[1].context.replica.named.values()))
                with torch.no_grad():
                    p.add_(1.0)

        in_pass(10, act)(run)

    with contextlib.redirect_stdout(printed):
        r = train_together(argv, meddle)
    r["said"] = printed.getvalue()
    return r


def test_heal(together: Together):
    members = [
        dict(PLAIN, train={"max_steps": 12}),
        dict(DORA, train={"max_steps": 11}),
        {"name": "z", "adapter": {"r": 2}, "train": {"max_steps": 4}},
    ]
    r = together("run", 3, members, work=healed, **FSDP2, sharding__audit="heal")
    print(r[0]["said"], [x["status"] for x in r])
    for x in r:
        for n, t in x["tensors"].items():
            assert same_bits(t, r[0]["tensors"][n]), n
    try:
        r = together("run2", 2, members, work=healed, **FSDP2)
    except BaseException as e:
        print("ERR", str(e)[-600:])


def test_bf16(together: Together, pools, command):
    s = {**FSDP2, "sharding__reduce_dtype": "bfloat16", "train__max_steps": 5}
    members = [
        PLAIN,
        dict(DORA, train={"seed": 5, "max_steps": 4}),
        dict(ADALORA, train={"seed": 3, "max_steps": 5}),
    ]
    r = together("run", 2, members, **s)
    for m in members:
        argv = words_alone(
            together.words("run", members, **s), m["name"], together.root / f"alone-{m['name']}"
        )
        a, lines = Runs(pools, lambda *_, **__: argv, together.root)(f"alone-{m['name']}", 2)
        got = together.lines("run", m["name"])
        for x, y in zip(got, lines):
            print(
                m["name"], x["step"], x["loss"] / y["loss"] - 1, x["grad_norm"] / y["grad_norm"] - 1
            )
        own = {n: t for n, t in r[0]["tensors"][m["name"]].items() if ".offset_" not in n}
        print(
            max(
                float((own[k] - t).norm() / t.norm().clamp_min(1e-12))
                for k, t in a[0]["tensors"].items()
                if t.numel()
            )
        )


def test_eight_resume(together: Together):
    s = {**FSDP2, "output__save_every": 2, "output__keep_last": 9}
    members = [EIGHT, SGD, PLAIN]
    whole = together("whole", 2, members, **s)
    for k in (3, 7):
        together(f"run{k}", 2, members, work=crashed_together, arguments=(k,), **s)
        r = together(f"run{k}", 2, members, **s)
        for a, b in zip(r, whole):
            for n, t in b["tensors"].items():
                assert same_bits(a["tensors"][n], t), (k, n)
