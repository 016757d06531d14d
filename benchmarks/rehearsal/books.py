"""The books of a GPU that is not there: what is launched, copied, waited for, and how much memory it takes.

A dispatch mode sees every operation of torch. Those on "cuda" run on fake tensors, which have shapes, types, devices
and lifetimes but no numbers; those on the CPU run as usual.
"""

import threading
import weakref
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

aten = torch.ops.aten

ALLOCATION = 512
"""Bytes to which torch's allocator rounds up."""

# What an operation launches on a GPU where it is not one kernel (eager torch; read from its CUDA sources, rounded).
KERNELS = {
    aten.native_group_norm.default: 3,
    aten.native_group_norm_backward.default: 5,
    aten.native_layer_norm_backward.default: 3,
    aten.convolution_backward.default: 3,
    aten._scaled_dot_product_flash_attention_backward.default: 3,
    aten._scaled_dot_product_efficient_attention_backward.default: 3,
}
_NO_KERNEL = {
    aten.empty.memory_format,
    aten.empty_like.default,
    aten.empty_strided.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
    aten.detach.default,
    aten._unsafe_view.default,
    aten._reshape_alias.default,
    aten.lift_fresh.default,
    aten.set_.source_Storage,
    aten.resize_.default,
}
_PRODUCTS = {
    *(aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default, aten.convolution.default),
    *(aten._scaled_dot_product_flash_attention.default, aten._scaled_dot_product_efficient_attention.default),
}
_READS = {aten._local_scalar_dense.default, aten.equal.default, aten.is_nonzero.default, aten.nonzero.default}
_MANY_AT_ONCE = "_foreach_"
_TENSORS_OF_ONE_LAUNCH = 64
"""Tensors that one launch of a `torch._foreach` function takes, of two lists (MultiTensorApply.cuh)."""


def is_fake(value: object) -> bool:
    """Return whether this is a tensor without numbers."""
    return isinstance(value, FakeTensor)


class Books(TorchDispatchMode):
    """Sends operations of the GPU to fake tensors and writes down what they would do, phase by phase."""

    def __init__(self) -> None:
        super().__init__()
        self.fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.phase = "start"
        self.now = 0
        self.peak = 0
        self.operations: dict[str, Counter[str]] = defaultdict(Counter)
        self.kernels: Counter[str] = Counter()
        self.waits: Counter[tuple[str, str]] = Counter()
        self.copies: Counter[tuple[str, str]] = Counter()
        self.copied_bytes: Counter[tuple[str, str]] = Counter()
        self.products: Counter[tuple[str, str]] = Counter()
        self.casts: Counter[str] = Counter()
        self._live: dict[int, tuple[int, str]] = {}  # number of a storage -> its bytes, the phase in which it was made
        self._at_peak: dict[int, tuple[int, str]] | None = None
        self._storages: dict[int, tuple[int, Any]] = {}
        self._num_storages = 0
        self._within_a_kernel = 0
        self._captures = False
        self._before_graphs = 0
        self.graph_pool = 0
        self._overflows: set[int] = set()  # storages of fp16's scaler that say whether a gradient has overflowed
        self._lock = threading.RLock()

    @contextmanager
    def in_phase(self, name: str) -> Iterator[None]:
        """Within the block, count for the phase `name`."""
        before, self.phase = self.phase, name
        try:
            yield
        finally:
            self.phase = before

    def begin(self) -> None:
        """Begin to count and to look for the peak from here on."""
        self.peak, self._at_peak = self.now, None
        for counts in (self.operations, self.kernels, self.waits, self.copies, self.copied_bytes):
            counts.clear()
        self.products.clear()
        self.casts.clear()

    # -- memory -------------------------------------------------------------------------------------------------------

    def see(self, tensor: torch.Tensor) -> None:
        """Count the memory of a tensor of the GPU whose storage is new."""
        if not is_fake(tensor) or tensor.device.type != "cuda":
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        with self._lock:
            if key in self._storages:
                return
            number = self._num_storages = self._num_storages + 1
            size = -(-storage.nbytes() // ALLOCATION) * ALLOCATION
            self._storages[key] = (number, weakref.ref(storage, partial(self._gone, key)))
            self._live[number] = (size, self.phase)
            self.now += size
            if self._captures:
                self.graph_pool = max(self.graph_pool, self.now - self._before_graphs)
            if self.now > self.peak:
                self.peak, self._at_peak = self.now, None

    def _gone(self, key: int, _: object) -> None:
        with self._lock:
            number, _ = self._storages.pop(key)
            if self._at_peak is None and self.now == self.peak:
                self._at_peak = dict(self._live)
            size, _ = self._live.pop(number)
            self.now -= size

    def number_of(self, tensor: torch.Tensor) -> int:
        """Return the number under which the storage of a tensor is in the books."""
        return self._storages[tensor.untyped_storage()._cdata][0]

    def parts_at_peak(self, names: dict[int, str]) -> Counter[str]:
        """Return the bytes at the peak by `names` of storages; those without one by the phase that made them."""
        parts: Counter[str] = Counter()
        for number, (size, phase) in (self._at_peak or self._live).items():
            parts[names.get(number, f"made in {phase}")] += size
        return parts

    # -- operations ---------------------------------------------------------------------------------------------------

    def launch(self, name: str, num_kernels: int = 1) -> None:
        """Count a kernel that is not an operation of torch."""
        self.operations[self.phase][name] += 1
        self.kernels[self.phase] += num_kernels

    @contextmanager
    def one_kernel(self) -> Iterator[None]:
        """Within the block, operations are parts of one kernel: they launch nothing, and what they make is not kept."""
        self._within_a_kernel += 1
        try:
            yield
        finally:
            self._within_a_kernel -= 1

    @contextmanager
    def capturing(self) -> Iterator[None]:
        """Within the block, which captures a CUDA graph, waits and copies from the host are errors.

        What is allocated in it is kept for the replays: `graph_pool` is the most that was alive of it at once.
        """
        self._captures = True
        self._before_graphs = self._before_graphs or self.now
        try:
            yield
        finally:
            self._captures = False

    def wait(self, reason: str) -> None:
        """Count that the host waits for the GPU."""
        if self._captures:
            raise RuntimeError(f"operation not permitted when stream is capturing: {reason}")
        self.waits[self.phase, reason] += 1

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Sequence[Any] = (), named: dict[str, Any] | None = None
    ) -> Any:
        named = dict(named or {})
        tensors = [each for each in tree_flatten((arguments, named))[0] if isinstance(each, torch.Tensor)]
        wanted = named.get("device")
        to_cuda = wanted is not None and torch.device(wanted).type == "cuda"
        on_cuda = [each for each in tensors if is_fake(each) and each.device.type == "cuda"]
        if not to_cuda and not any(is_fake(each) for each in tensors):
            if named.get("pin_memory"):
                named.pop("pin_memory")  # which only a driver can do
            return function(*arguments, **named)
        if function in _READS and on_cuda:
            self.wait(str(function))
            if self.number_of(tensors[0]) in self._overflows:
                return 0.0
            return True if function is aten.equal.default else _some_number(tensors[0])
        if function is aten._amp_foreach_non_finite_check_and_unscale_.default:
            self._overflows.add(self.number_of(arguments[1]))
        left = self._copy_to_host(function, arguments, named, on_cuda, to_cuda=to_cuda)
        if left is not None:
            return left
        self._note_copy_to_gpu(function, arguments, named, tensors, on_cuda, to_cuda=to_cuda)
        self._require_one_dtype(function, tensors)
        with self.fake_mode:
            result = function(*arguments, **named)
        self._note(function, arguments, tensors, result)
        return result

    def _copy_to_host(
        self, function: Any, arguments: Sequence[Any], named: dict[str, Any], on_cuda: Sequence[Any], *, to_cuda: bool
    ) -> torch.Tensor | None:
        """Return the result if this copies from the GPU to the host: numbers there are made up."""
        if function is aten._to_copy.default and on_cuda and named.get("device") is not None and not to_cuda:
            tensor = on_cuda[0]
            self._count_copy("device to host", tensor, waits=not named.get("non_blocking"))
            one = torch.ones((), dtype=named.get("dtype") or tensor.dtype).expand(tensor.shape)
            return one.clone() if tensor.numel() < 2**20 else one
        if function is aten.copy_.default and on_cuda and arguments[0].device.type == "cpu":
            self._count_copy("device to host", arguments[1], waits=not (len(arguments) > 2 and arguments[2]))
            result: torch.Tensor = arguments[0]
            return result
        return None

    def _note_copy_to_gpu(
        self,
        function: Any,
        arguments: Sequence[Any],
        named: dict[str, Any],
        tensors: Sequence[Any],
        on_cuda: Sequence[Any],
        *,
        to_cuda: bool,
    ) -> None:
        if to_cuda and tensors and not on_cuda:
            self._count_copy("host to device", tensors[0], waits=not named.get("non_blocking"))
        if function is aten.copy_.default and arguments[1].device.type == "cpu" and arguments[1].numel() > 1:
            self._count_copy("host to device", arguments[1], waits=not (len(arguments) > 2 and arguments[2]))

    @staticmethod
    def _require_one_dtype(function: Any, tensors: Sequence[Any]) -> None:
        dtypes = {each.dtype for each in tensors if each.is_floating_point()}
        if function in _PRODUCTS and len(dtypes) > 1:  # which fake tensors let pass, and kernels do not
            raise RuntimeError(f"{function}: {' and '.join(sorted(map(str, dtypes)))} together")

    def _note(self, function: Any, arguments: Sequence[Any], tensors: Sequence[Any], result: Any) -> None:
        if self._within_a_kernel:
            return
        outputs = [each for each in tree_flatten(result)[0] if isinstance(each, torch.Tensor)]
        for output in outputs:
            self.see(output)
        if function in _NO_KERNEL or function.is_view:
            return
        name = function.overloadpacket.__name__
        if name.startswith(_MANY_AT_ONCE):
            self._note_many(str(function), arguments)
            return
        if not any(output.device.type == "cuda" for output in outputs):
            return
        self.launch(str(function), KERNELS.get(function, 1))
        if function is aten._to_copy.default and tensors and tensors[0].dtype != outputs[0].dtype:
            self.casts[self.phase] += 1
        if function in _PRODUCTS:
            self.products[self.phase, str(outputs[0].dtype).removeprefix("torch.")] += 1

    def _note_many(self, name: str, arguments: Sequence[Any]) -> None:
        """Count the launches of a function of lists, which takes some tens of tensors in each."""
        longest = max(len(each) for each in arguments if isinstance(each, (list, tuple)))
        self.launch(name, -(-longest // _TENSORS_OF_ONE_LAUNCH))

    def _count_copy(self, direction: str, tensor: torch.Tensor, *, waits: bool) -> None:
        if self._captures:
            raise RuntimeError(f"a copy {direction} would be replayed with what lies on the host by then")
        self.copies[self.phase, direction] += 1
        self.copied_bytes[self.phase, direction] += tensor.numel() * tensor.dtype.itemsize
        if waits:
            self.wait(direction)


def _some_number(tensor: torch.Tensor) -> bool | float | int:
    if tensor.dtype == torch.bool:
        return True
    return 1.0 if tensor.dtype.is_floating_point else 1
