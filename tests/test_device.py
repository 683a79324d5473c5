"""The code on a simulated GPU: what would fail on a GPU, and what would wait for it. It needs no GPU."""

import contextlib
import dataclasses

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

import cache
import sample
import train
from helpers import same, state_of
from mod import GPT
from mode import build, config_class

GPU = torch.device("cuda", 0)
PROPERTIES = {"device": GPU, "is_cuda": True, "is_cpu": False}
READS = "item tolist cpu numpy nonzero unique masked_select equal allclose multinomial __bool__ __int__ __float__ "
READS = (READS + "__index__ __format__ __repr__ __contains__").split()
MOVES = "to copy_ __set__ _has_compatible_shallow_copy_type".split()  # tensors of both devices may meet here


class SimulatedGPU(TorchFunctionMode):
    """
    Inside this context "cuda" is a device whose tensors lie on the CPU with a tag. An operation on tensors of both
    devices fails, as in PyTorch. What Apple GPUs cannot do fails too. Three counts:

        reads     Python asks for numbers of the device, and so waits until all that is queued there is done
        copies    from Python to the device
        waits     reads, and copies that wait as well because they are not from pinned memory with non_blocking

    It sees each call that Python makes, but not what happens inside of it: backward passes, kernels, hidden reads (of
    these it knows torch.multinomial's check of its input). It computes without autocast and float16's scaler.
    """

    def __init__(self, monkeypatch):
        super().__init__()
        self.tagged, self.pinned = WeakTensorKeyDictionary(), WeakTensorKeyDictionary()
        self.reads = self.copies = self.waits = 0
        groups = torch._C._group_tensors_by_device_and_dtype

        def groups_with_tags(tensors, *args):  # clipping and AdamW ask C++ for the device
            place = GPU if any(map(self.on, tree_leaves(tensors))) else torch.device("cpu")
            return {(place, dtype): group for (_, dtype), group in groups(tensors, *args).items()}

        monkeypatch.setattr(torch._C, "_group_tensors_by_device_and_dtype", groups_with_tags)
        monkeypatch.setattr(torch, "Generator", Generator)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "simulated")

    @contextlib.contextmanager
    def counting(self, counts):
        """Append the (reads, copies, waits) of the block to a list."""
        before = self.reads, self.copies, self.waits
        yield
        counts.append(tuple(now - then for now, then in zip((self.reads, self.copies, self.waits), before)))

    def counted(self, function, counts):
        """The function, with its counts appended to a list at each call."""

        def call(*args, **kwargs):
            with self.counting(counts):
                return function(*args, **kwargs)

        return call

    def on(self, x):
        return isinstance(x, torch.Tensor) and x in self.tagged

    def read(self):
        self.reads, self.waits = self.reads + 1, self.waits + 1

    def copy(self, waits=True):
        self.copies, self.waits = self.copies + 1, self.waits + waits

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func.__name__
        attribute = getattr(getattr(func, "__self__", None), "__name__", None)  # of which func is a getter or setter
        if name in ("_parse_to", "device"):  # these only talk about devices
            return func(*args, **kwargs)
        if name == "__get__" and attribute in PROPERTIES and self.on(args[0]):
            return PROPERTIES[attribute]
        if name == "pin_memory":
            self.pinned[args[0]] = True
            return args[0]
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if name in ("__getitem__", "__setitem__") and self.on(args[0]):
            for part in args[1] if isinstance(args[1], tuple) else args[1:2]:
                if isinstance(part, list) or isinstance(part, torch.Tensor) and not self.on(part):
                    self.copy()  # PyTorch brings an index to the device
                elif isinstance(part, torch.Tensor) and part.dtype == torch.bool:
                    self.read()  # how many are True?
            tensors = [x for x in (args[0], *args[2:]) if isinstance(x, torch.Tensor)]
        on = [self.on(x) for x in tensors]
        if name not in MOVES and any(on) and not all(there or x.dim() == 0 for x, there in zip(tensors, on)):
            raise RuntimeError(f"{name}: expected all tensors to be on the same device")
        if name in ("sort", "argsort") and args[0].dtype == torch.int64 and max(args[0].shape) > 256:
            raise RuntimeError(f"{name}: int64 is sorted wrongly beyond 256 elements on MPS (PyTorch's issue 155560)")
        if name.startswith("index_copy"):
            raise RuntimeError("index_copy: 100 times slower on MPS than on a CPU (PyTorch's pull request 185750)")

        asked = [torch.device(x) for x in (*args, *kwargs.values()) if is_device(x)]
        goal = asked[0] == GPU or asked[0].type == "cuda" if asked else None  # should the result be on the device?
        if goal:  # it is computed on the CPU
            args = [torch.device("cpu") if is_device(x) else x for x in args]
            kwargs = {key: torch.device("cpu") if is_device(x) else x for key, x in kwargs.items()}
        result = func(*args, **kwargs)
        if name in READS and any(on):
            self.read()
        if name in ("to", "cpu"):
            goal = False if name == "cpu" else on[0] if goal is None else goal
            result = result.clone() if result is args[0] and goal != on[0] else result  # a tensor of its own
        if name == "to" and on[0] and not goal:
            self.read()
        elif name == "to" and goal and not on[0]:
            self.copy(waits=not (args[0] in self.pinned and kwargs.get("non_blocking")))
        elif name == "copy_" and on[0] != on[1]:
            goal = on[0]
            self.copy() if goal else self.read()
        elif name in ("tensor", "as_tensor", "asarray") and goal and not any(on):
            self.copy()
        elif name == "__set__" and attribute == "data":
            goal = on[1]
        for x in tree_leaves(args[0] if name == "__set__" else result):
            if isinstance(x, torch.Tensor) and (any(on) if goal is None else goal):
                self.tagged[x] = True
            elif isinstance(x, torch.Tensor) and x in self.tagged:
                del self.tagged[x]
        return result


def is_device(x):
    return isinstance(x, torch.device) or isinstance(x, str) and x.partition(":")[0] in ("cpu", "cuda")


class Generator(torch.Generator):
    def __new__(cls, device="cpu"):
        return super().__new__(cls)


@pytest.fixture
def gpu(monkeypatch):
    return SimulatedGPU(monkeypatch)


def test_the_simulated_gpu_fails_and_counts_as_a_real_one(gpu):
    here = torch.ones(3)
    with gpu:
        there, number = here.to("cuda"), torch.tensor(2.0)
        assert (gpu.copies, gpu.waits, gpu.reads) == (1, 1, 0)
        assert (there.device, here.device, (there * number).device) == (GPU, torch.device("cpu"), GPU)
        assert here.pin_memory().to("cuda", non_blocking=True).is_cuda and (gpu.copies, gpu.waits) == (2, 1)
        layer = torch.nn.Linear(3, 3).to(GPU)
        for mixed in (lambda: here + there, lambda: layer(here), lambda: torch.stack([here, there]),
                      lambda: there.gather(0, torch.zeros(1).long()), lambda: there.add_(here)):  # fmt: skip
            with pytest.raises(RuntimeError, match="same device"):
                mixed()
        layer(there).sum().backward()
        assert layer.weight.grad.is_cuda and not gpu.reads
        for reads in (lambda x: x[0].item(), lambda x: x.tolist(), lambda x: bool(x[0]), lambda x: float(x[0]),
                      lambda x: x.cpu(), lambda x: x.to("cpu"), lambda x: here.copy_(x), lambda x: x[x > 0],
                      lambda x: x.nonzero(), lambda x: torch.multinomial(x, 1)):  # fmt: skip
            before = gpu.reads
            reads(there)
            assert gpu.reads == before + 1
        for copies in (lambda: torch.tensor([1], device="cuda"), lambda: there[[0, 2]], lambda: there.copy_(here)):
            before = gpu.copies
            copies()
            assert gpu.copies == before + 1
        for wrong in (lambda: torch.arange(257).sort(), lambda: here.index_copy(0, torch.tensor([0]), here[:1])):
            with pytest.raises(RuntimeError, match="MPS"):
                wrong()


KINDS = {
    "MoD": dict(),
    "dense": dict(route_every=0),
    "router": dict(causal_method="router"),
    "exploring_noise": dict(variant="exploring_noise"),
    "position": dict(variant="position"),
    "attention_only": dict(variant="attention_only"),
    "expert_threshold": dict(variant="expert_threshold"),
    "moe": dict(n_expert=2),
    "staged": dict(n_expert=2, staged=True),
}
kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())


def decisions(config):
    """How many decisions shape a causal pass: each routed block's, and each mixture's of experts."""
    routed = config.n_layer // config.route_every if config.route_every else 0
    return routed * (2 if getattr(config, "staged", False) else 1)


@kinds
def test_a_run_on_the_device_waits_only_to_log_evaluate_and_save(tiny, tmp_path, gpu, monkeypatch, kind):
    config = dataclasses.replace(tiny, n_layer=4, gradient_accumulation_steps=2, max_iters=8, eval_interval=4, **kind)
    config = dataclasses.replace(config, log_interval=2, eval_iters=3, decay_lr=False, dtype="float32", compile="False")
    train.train(config)
    there = dataclasses.replace(config, device="cuda", out_dir=str(tmp_path / "gpu"))
    steps, evaluations, logs = [], [], []
    monkeypatch.setattr(train, "training_step", gpu.counted(train.training_step, steps))
    monkeypatch.setattr(train, "evaluate", gpu.counted(train.evaluate, evaluations))
    monkeypatch.setattr(train.run.Progress, "read", gpu.counted(train.run.Progress.read, logs))
    with gpu:
        train.train(dataclasses.replace(there, max_iters=4))
        train.train(dataclasses.replace(there, resume=True))
    assert steps == [(0, 2, 0)] * 8  # each micro-step copies its batch; nothing waits
    assert len(evaluations) == 3  # at steps 0, 4 and 8
    for reads, copies, waits in evaluations:  # three batches, and all figures at the end
        assert reads <= 3 * decisions(config) + 2 and copies == 3 and waits == reads
    assert set(logs) == {(0, 0, 0), (1, 0, 1)} and logs.count((1, 0, 1)) == 4  # steps 2, 4, 6, 8
    assert same(state_of(there), state_of(config))  # it does compute on the CPU


def model_of(gpu, **kind):
    torch.manual_seed(0)
    options = dict(block_size=12, vocab_size=23, n_layer=4, n_head=2, n_embd=16, predictor_hidden=4) | kind
    model = build(config_class(options)(**options)).eval()
    for p in model.parameters():
        p.data *= 9  # so that some tokens are taken and others not
    return model


@kinds
def test_a_causal_pass_waits_for_its_decisions_alone(gpu, kind):
    model, idx, counts = model_of(gpu, **kind), torch.randint(23, (4, 12)), []
    with gpu:
        model.to("cuda")
        idx = idx.to("cuda")
        with gpu.counting(counts), torch.no_grad():
            model(idx, idx, routing="causal")
    taken = sum(block.taken is not None and int(block.taken.sum()) for block in model.routed_blocks)
    assert counts[0][1] == 0 and counts[0][0] == counts[0][2] <= decisions(model.config)
    assert taken or not model.routed_blocks


def reads_and_copies_of_each_token(gpu, stream):
    """The tokens of a stream, and what each of them cost; the first, which reads the prompts, left out."""
    counts, tokens = [], []
    while True:
        with gpu.counting(counts):
            token = next(stream, None)
        if token is None:
            return torch.stack(tokens), counts[1:-1]
        tokens.append(token)


@pytest.mark.parametrize(
    "prompts", [[[1, 2, 3]], [[1, 2, 3]] * 3, [[1, 2, 3], [4], [5, 6]]], ids=["one", "3", "ragged"]
)
@kinds
def test_a_decoded_token_waits_once_per_decision(gpu, kind, prompts):
    model = model_of(gpu, **kind)
    expected = torch.stack(list(cache.stream(model, prompts, 30, seed=1)))
    with gpu:
        model.to("cuda")
        text, counts = reads_and_copies_of_each_token(gpu, cache.stream(model, prompts, 30, seed=1))
        assert text.is_cuda and torch.equal(text.cpu(), expected)
    in_window = counts[: 12 - 3 - 1]  # after that, windows restart
    for reads, copies, waits in in_window:
        assert reads <= decisions(model.config) + 1 and waits == reads  # torch.multinomial checks its input
        assert copies <= (0 if len(prompts) == 1 else 1 + len(model.routed_blocks))
    assert any(reads for reads, _, _ in in_window)


def test_generate_brings_the_prompt_to_the_device(gpu):
    prompt = torch.tensor([[1, 2, 3]])
    for generate in (GPT.generate, cache.generate):
        model = model_of(gpu)
        expected = generate(model, prompt, 20, seed=1)
        with gpu:
            text = generate(model.to("cuda"), prompt, 20, seed=1)
            assert text.is_cuda and torch.equal(text.cpu(), expected)


@pytest.mark.parametrize(
    "options", [dict(), dict(num_samples=3, dtype="bfloat16", top_p=0.9, top_k=9)], ids=["one", "3"]
)
@pytest.mark.parametrize("kind", ["MoD", "dense", "staged"])
def test_sample_reads_each_token_once(tiny, gpu, monkeypatch, kind, options):
    capacity = {} if kind == "dense" else dict(capacity=0.5)
    train.train(dataclasses.replace(tiny, n_layer=4, **capacity, **KINDS[kind]))
    config = sample.SampleConfig(out_dir=tiny.out_dir, start="ab", max_new_tokens=40, device="cpu", show_depth=True)
    config = dataclasses.replace(config, **{"dtype": "float32", "show_depth": kind != "dense"} | options)
    expected, counts = sample.sample(config), []

    def stream(*args, **kwargs):
        tokens = cache.stream(*args, **kwargs)
        while True:
            with gpu.counting(counts):  # everything from one token to the next
                token = next(tokens, None)
                if token is None:
                    return
                yield token

    monkeypatch.setattr(sample, "stream", stream)
    with gpu:
        assert sample.sample(dataclasses.replace(config, device="cuda")) == expected
    model, _ = sample.load(tiny.out_dir, "cpu")
    for reads, copies, waits in counts[1 : 16 - 2]:
        assert reads <= decisions(model.config) + 2 and waits == reads and copies <= 3


def test_more_than_256_tokens_are_sorted_as_apple_gpus_can(gpu):
    model, idx = model_of(gpu, block_size=600, capacity=0.6), torch.randint(23, (2, 600))
    expected = model(idx)[0], model(idx, routing="causal")[0]
    with gpu:
        model, idx = model.to("cuda"), idx.to("cuda")
        assert all(torch.equal(model(idx, routing=r)[0].cpu(), e) for r, e in zip(("topk", "causal"), expected))
