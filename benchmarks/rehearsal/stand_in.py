"""A GPU that is not there: within `stand_in_gpu()` programs run as on one, and `Books` are kept of what they do.

Needs a CUDA build of torch 2.15 and no driver: `why_not` says what is missing. What is replaced, and why:

  does this GPU have a context?              autograd asks before each backward pass, and the answer needs a driver
  torch.cuda.amp's check                     autocast("cuda") would switch itself off
  scaled_dot_product_attention               without a GPU torch takes the formula; a GPU takes flash attention
  pin_memory, Event, Stream, empty_cache     need a driver
  torch.compile, kernels of Triton           are counted, and what is between is not kept, as in a kernel
  the types that torch takes in lists        are compared with `is`; the tensors here have another one
"""

import ctypes
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.optim.optimizer import _foreach_supported_types
from torch.utils._pytree import tree_flatten, tree_map

from benchmarks.rehearsal.books import Books, aten, is_fake
from library.optim import triton_launches

CUDA = torch.device("cuda", 0)
CARD_BYTES = 80 * 2**30
"""The memory of the card that is not there: enough for every case."""
_TORCH = "2.15"
_KEPT_ALIVE: list[Any] = []
_attention_on_cpu = torch.nn.functional.scaled_dot_product_attention


def why_not() -> str | None:
    """Return why this torch cannot rehearse a GPU, or None."""
    if not torch.__version__.startswith(_TORCH):
        return f"the rehearsal knows the internals of torch {_TORCH}, not of {torch.__version__}"
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    if torch.cuda.is_available():
        return "there is a GPU: measure instead"
    return None


@contextmanager
def _no_context() -> Iterator[None]:
    """Let "has the GPU a context?" be answered no. Its slot in the table of CUDAHooks is the fifth (torch 2.15):
    two destructors, isBuilt, isAvailable, hasPrimaryContext (ATen/detail/AcceleratorHooksInterface.h)."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    get = library._ZN2at6detail12getCUDAHooksEv
    get.restype = ctypes.c_void_p
    pointer = ctypes.POINTER(ctypes.c_void_p)
    hooks = ctypes.cast(get(), pointer)
    before = hooks[0]
    assert before is not None
    header, slot, size = 2, 4, 64
    table = ctypes.cast(before - header * 8, pointer)
    changed = (ctypes.c_void_p * (header + size))(*[table[index] for index in range(header + size)])
    answer = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_int8)(lambda *_: False)
    changed[header + slot] = ctypes.cast(answer, ctypes.c_void_p).value
    _KEPT_ALIVE.append((changed, answer))
    hooks[0] = ctypes.addressof(changed) + header * 8
    try:
        yield
    finally:
        hooks[0] = before


def _queue_of(books: Books) -> tuple[type, type]:
    """Return stand-ins for `torch.cuda.Event` and `torch.cuda.Stream`."""

    class Event:
        def __init__(self, *_: Any, **__: Any) -> None:
            pass

        def record(self, *_: Any) -> None:
            pass

        def wait(self, *_: Any) -> None:
            pass

        def query(self) -> bool:
            return True

        def synchronize(self) -> None:
            books.wait("an event")

    class Stream:
        def __init__(self, *_: Any, **__: Any) -> None:
            pass

        def record_event(self, *_: Any) -> Event:
            return Event()

        def wait_event(self, *_: Any) -> None:
            pass

        def wait_stream(self, *_: Any) -> None:
            pass

        def synchronize(self) -> None:
            books.wait("a stream")

    return Event, Stream


class _Graph:
    """A stand-in for a CUDA graph: one launch."""

    def __init__(self, books: Books):
        self._books = books

    def replay(self) -> None:
        self._books.launch("a CUDA graph")


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """What torch picks on a GPU: flash attention, or in float32 the memory-efficient one."""
    if not query.is_cuda:
        return _attention_on_cpu(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    if torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
        query, key, value = (tensor.to(dtype) for tensor in (query, key, value))
        attn_mask = attn_mask.to(dtype) if attn_mask is not None and attn_mask.dtype != torch.bool else attn_mask
    if len({query.dtype, key.dtype, value.dtype}) > 1:
        raise RuntimeError(f"attention of {query.dtype}, {key.dtype} and {value.dtype}")
    if attn_mask is None and query.dtype != torch.float32:
        flash: torch.Tensor = aten._scaled_dot_product_flash_attention(
            query, key, value, dropout_p, is_causal, scale=scale
        )[0]
        return flash
    needs_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value))
    bias = None
    if attn_mask is not None:
        bias = attn_mask if attn_mask.dtype != torch.bool else torch.zeros_like(attn_mask, dtype=query.dtype)
        bias = bias.expand(*query.shape[:-1], key.shape[-2])
    efficient: torch.Tensor = aten._scaled_dot_product_efficient_attention(
        query, key, value, bias, needs_grad, dropout_p, is_causal, scale=scale
    )[0]
    return efficient


def _apply(module: torch.nn.Module, change: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
    """As nn.Module._apply, by new parameters: a fake tensor cannot take another one's place."""
    for child in module.children() if recurse else ():
        child._apply(change)
    for name, parameter in module._parameters.items():
        if parameter is not None:
            with torch.no_grad():
                changed = change(parameter)
            if changed is not parameter:
                module._parameters[name] = torch.nn.Parameter(changed, parameter.requires_grad)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = change(buffer)
    return module


KERNELS_OF_COMPILED = {"_mean_squares": 3, "_norm": 2, "_norm_of_update": 2, "_mean_squares_of_kernels": 2}
"""Launches of a compiled function where they are more than one: reductions take several (inductor's, rounded)."""


def _compile_with(books: Books) -> Callable[..., Any]:
    """Return a stand-in for `torch.compile`: the plain function as one kernel, whose temporaries stay in registers.

    Blocks of the network run as they are: what a compiler would fuse in them is not known.
    """

    def compile_(
        function: Callable[..., Any] | None = None, *, fullgraph: bool = False, **_: Any
    ) -> Callable[..., Any]:
        assert function is not None
        if fullgraph:  # a block of the network, of which autograd must see the operations
            return function
        made: dict[Any, Any] = {}  # by kinds of arguments: the kinds of what is returned

        def run(*arguments: Any, **named: Any) -> Any:
            kinds = str([_kind(each) for each in tree_flatten((arguments, named))[0]])
            if kinds not in made:
                with books.one_kernel():
                    made[kinds] = tree_map(_kind, function(*arguments, **named))
            result = tree_map(lambda kind: kind.made(books) if isinstance(kind, _Kind) else kind, made[kinds])
            books.launch(f"compiled {function.__name__}", KERNELS_OF_COMPILED.get(function.__name__, 1))
            return result

        return run

    return compile_


@dataclass(frozen=True)
class _Kind:
    """What a kernel allocates for a tensor that it returns."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def made(self, books: Books) -> torch.Tensor:
        with books.fake_mode:
            tensor = torch.empty(self.shape, dtype=self.dtype, device=CUDA)
        books.see(tensor)
        return tensor


def _kind(value: Any) -> Any:
    """Return the kind of a tensor; of other arguments no kernel's outputs depend on the value."""
    if isinstance(value, torch.Tensor):
        return _Kind(tuple(value.shape), value.dtype)
    return type(value).__name__ if value is not None else None


def _launch_with(books: Books) -> Callable[..., None]:
    """Return a stand-in for the launch of a program of Triton."""

    def launch(program: Any, num_programs: int, *_: Any, **__: Any) -> None:
        if num_programs:
            books.launch(f"triton {program.__name__}")

    return launch


def _pinned(tensor: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return tensor if is_fake(tensor) else tensor.clone()


@contextmanager
def stand_in_gpu() -> Iterator[Books]:
    """Within the block there is a GPU that computes nothing; yield its books.

    Only in a process that has not computed a gradient yet: autograd starts its threads, for the devices there are, at
    its first use. End the process by `os._exit`: the thread of a GPU that is not there cannot be joined.
    """
    import torch._dynamo  # before anything of torch is replaced
    import torch.cuda.amp.common

    torch._C._ensureCUDADeviceGuardSet()
    books = Books()
    event, stream = _queue_of(books)
    replaced: tuple[tuple[Any, str, Any], ...] = (
        (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
        (torch.cuda, "_lazy_init", lambda: None),
        (torch.cuda, "is_available", lambda: False),  # as it is: fake tensors ask before each operation
        (torch.cuda, "is_bf16_supported", lambda *_, **__: True),
        (torch.cuda, "empty_cache", lambda: None),
        (torch.cuda, "synchronize", lambda *_: books.wait("synchronize")),
        (torch.cuda, "set_device", lambda *_: None),
        (torch.cuda, "current_device", lambda: 0),
        (torch.cuda, "Event", event),
        (torch.cuda, "Stream", stream),
        (torch.cuda, "current_stream", lambda *_: stream()),
        (torch.cuda, "stream", lambda *_: nullcontext()),
        (torch.cuda, "graph_pool_handle", lambda: (0, 0)),
        (torch.cuda, "CUDAGraph", partial(_Graph, books)),
        (torch.cuda, "graph", lambda *_, **__: books.capturing()),
        (torch.Tensor, "record_stream", lambda *_: None),
        (torch.Tensor, "pin_memory", _pinned),
        (torch.nn.Module, "_apply", _apply),
        (torch.nn.functional, "scaled_dot_product_attention", _attention),
        (torch, "compile", _compile_with(books)),
        (triton_launches, "launch", _launch_with(books)),
        (triton_launches, "address_of", lambda tensor: 0),
        (import_module("torch.optim.optimizer"), "_foreach_supported_types", [*_foreach_supported_types, FakeTensor]),
        (import_module("torch.nn.utils.clip_grad"), "_has_foreach_support", lambda *_: True),
        (torch.cuda, "mem_get_info", lambda *_: (CARD_BYTES - books.now, CARD_BYTES)),
        (torch.cuda, "memory_reserved", lambda *_: books.now),
        (torch.cuda, "memory_allocated", lambda *_: books.now),
        (torch.cuda, "get_device_properties", lambda *_: SimpleNamespace(name="none", total_memory=CARD_BYTES)),
    )
    with ExitStack() as stack:
        stack.enter_context(_no_context())
        for target, name, value in replaced:
            stack.enter_context(patch.object(target, name, value))
        stack.enter_context(books)
        yield books
