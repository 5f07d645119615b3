"""After the last mask only what is left goes on: in the parameters and in the optimizer's state."""

import torch
from adalora_nets import Ours, adapted, kept_of, mse


def test_shrinking_keeps_the_parameters_and_cuts_the_moments() -> None:
    run = Ours.start(adapted(total_step=20, tfinal=10, orth_reg_weight=0.2))
    parameters = dict(run.replica.named)
    held = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    for t in range(1, 10):
        run.step(mse(run.model, t))
    mse(run.model, 10).backward()
    run.replica.reduce_gradients()
    moments = {}
    for name, p in parameters.items():
        state = run.optimizer.state[p]
        first = state["exp_avg"] * 0.9 + 0.1 * p.grad
        moments[name] = (first, state["exp_avg_sq"] * 0.999 + 0.001 * p.grad.square())
    run.optimizer.step()
    assert run.replica.method.is_shrunk
    left = kept_of(run)
    for name, p in run.model.named_parameters():
        if name not in parameters:
            continue
        assert p is parameters[name] and id(p) in held
        dim, kept = int(name.endswith("lora_B")), left[name.partition(".")[0]]
        assert p.shape[dim] == len(kept) and p.grad is None
        state = run.optimizer.state[p]
        assert float(state["step"]) == 10
        for slot, whole in zip(("exp_avg", "exp_avg_sq"), moments[name], strict=True):
            expected = whole.index_select(dim, torch.tensor(kept, dtype=torch.int64))
            torch.testing.assert_close(state[slot], expected, rtol=1e-5, atol=1e-12)
    assert len(run.optimizer.state) == len(parameters)
    assert run.replica.numel == sum(p.numel() for p in parameters.values())


def test_it_trains_on_with_old_losses_alive() -> None:
    """Autograd remembers the shape of a leaf for as long as a graph through it is alive."""
    run = Ours.start(adapted(total_step=20, tfinal=10))
    losses = []
    for t in range(1, 21):
        losses.append(mse(run.model, t))
        run.step(losses[-1])
        before = {name: p.detach().clone() for name, p in run.replica.named.items()}
    assert run.replica.method.step == 20
    losses.append(mse(run.model, 21))
    run.step(losses[-1])
    for name, p in run.replica.named.items():
        assert p.numel() == 0 or not torch.equal(p, before[name]), name
