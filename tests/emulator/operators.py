"""Puts the emulated CUDA kernels in the place of the CPU's, so that every test of the operators runs them."""

import warnings

import torch

from sea_kernels import ops

from . import build

SLICES = 3  # blocks that the tiles are dealt out to: few enough for several tiles each
GUARD = 64  # bytes before and after every buffer

_buffers = []
_library = torch.library.Library("sea_kernels", "IMPL")  # its end would take the registrations along


def _new(shape, dtype, strides=None):
    """Memory full of NaN between two guards, which `check_guards` looks at."""
    size = torch.empty((), dtype=dtype).element_size()
    count = 1
    for n in shape:
        count *= n
    raw = torch.full((count * size + 2 * GUARD,), 0xFF, dtype=torch.uint8)
    inner = raw[GUARD : GUARD + count * size].view(dtype)
    _buffers.append((raw, count * size))
    return inner.view(shape) if strides is None else inner.as_strided(shape, strides)


def _check_guards():
    buffers = _buffers.copy()
    _buffers.clear()
    for raw, size in buffers:
        assert (raw[:GUARD] == 0xFF).all() and (raw[GUARD + size :] == 0xFF).all(), "a kernel wrote beside its memory"


def _map(x):
    return x.data_ptr(), str(x.dtype).removeprefix("torch."), list(x.shape), list(x.stride())


def _maps(tensors):
    return [_map(x) for x in tensors]


def _regions(tensors):
    if not tensors:
        return []
    classes, area, _, _, bits = tensors
    pixels = bits.numel() // ((area.shape[1] + 31) // 32)
    return [x.data_ptr() for x in tensors] + [classes.numel(), pixels]


def _type(*maps):
    """Of the maps in shared memory."""
    dtypes = {x.dtype for x in maps}
    dtype = dtypes.pop() if len(dtypes) == 1 else ops._compute_dtype(maps)
    return str(dtype).removeprefix("torch.")


def _gradient(x):
    return _new(x.shape, x.dtype, ops._gradient(x).stride())


def _pointer(x):
    return 0 if x is None else x.data_ptr()


class Operators:
    """The native operators of sea_kernels.ops, by name."""

    def __init__(self, kernels):
        self.kernels = kernels

    def rasterize(
        self, boxes, labels, batch_index, counts, ignore_boxes, ignore_batch_index, ignore_counts, image_sizes,
        image_size_list, batch_size, level_shapes, strides, num_classes, center_ratio, present,
    ):  # fmt: skip
        levels, count = len(level_shapes) // 2, labels.numel()
        classes = min(count, num_classes) if present is None else num_classes
        pixels = batch_size * sum(h * w for h, w in zip(level_shapes[::2], level_shapes[1::2]))
        out = [
            _new((classes,), torch.int64),
            _new((levels, 1 + 2 * classes), torch.float32),
            _new((levels,), torch.float32),
            _new((levels, batch_size, 2), torch.int32),
            _new(((1 + 2 * classes + 31) // 32 * pixels,), torch.int32),
        ]
        scratch = _new((self.kernels.raster_scratch(count, num_classes, levels, _pointer(present)),), torch.uint8)
        ignored = (0, 0, 0, []) if ignore_boxes is None else (
            ignore_boxes.data_ptr(), ignore_boxes.shape[0], _pointer(ignore_batch_index), list(ignore_counts)
        )  # fmt: skip
        rasterize = self.kernels.rasterize_float64 if boxes.dtype == torch.float64 else self.kernels.rasterize_float32
        rasterize(
            (boxes.data_ptr(), count, _pointer(batch_index), list(counts)), ignored, labels.data_ptr(),
            _pointer(image_sizes), list(image_size_list), batch_size, list(level_shapes), list(strides), num_classes,
            center_ratio, _pointer(present), [x.data_ptr() for x in (*out, scratch)],
        )  # fmt: skip
        _check_guards()
        return tuple(out)

    def anchor_pool(self, features, regions):
        kind, arguments = _type(*features), (_maps(features), _regions(regions), SLICES)
        scratch = _new((self.kernels.pool_scratch(kind, *arguments),), torch.uint8)
        anchors = _new((len(features), regions[1].shape[1], features[0].shape[1]), ops._compute_dtype(features))
        self.kernels.pool(kind, *arguments, scratch.data_ptr(), anchors.data_ptr())
        _check_guards()
        return anchors

    def anchor_pool_backward(self, gradient, features, regions):
        out = [_gradient(x) for x in features]
        self.kernels.pool_backward(_type(*features), gradient.data_ptr(), _maps(out), _regions(regions), SLICES)
        _check_guards()
        return out

    def anchor_cosine(self, features, anchors, regions):
        dtype = anchors.dtype
        kind, arguments = str(dtype).removeprefix("torch."), (_maps(features), _regions(regions), SLICES)
        scratch = _new((self.kernels.cosine_scratch(kind, *arguments, False),), torch.uint8)
        out = [_new((x.shape[0], anchors.shape[1], *x.shape[2:]), dtype) for x in features]
        self.kernels.cosine(
            kind, arguments[0], _maps(out), [], *arguments[1:], scratch.data_ptr(), anchors.data_ptr(), 0
        )
        _check_guards()
        return out

    def anchor_cosine_backward(self, gradients, features, anchors, regions):
        dtype = anchors.dtype
        kind, arguments = str(dtype).removeprefix("torch."), (_maps(features), _regions(regions), SLICES)
        scratch = _new((self.kernels.cosine_scratch(kind, *arguments, True),), torch.uint8)
        out = [_gradient(x) for x in features]
        anchor_gradient = _new(anchors.shape, dtype)
        self.kernels.cosine(
            kind, arguments[0], _maps(gradients), _maps(out), *arguments[1:],
            scratch.data_ptr(), anchors.data_ptr(), anchor_gradient.data_ptr(),
        )  # fmt: skip
        _check_guards()
        return [*out, anchor_gradient]

    def _loss(self, student, teacher, gradient, parts, regions, options, save):
        return self.kernels.Loss(
            _type(*student, *teacher), _maps(student), _maps(teacher), _maps(gradient), parts, _regions(regions),
            *options, save, SLICES,
        )  # fmt: skip

    def sea_loss(self, student, teacher, parts, regions, *rest):
        *options, save, _kept_rows = rest
        dtype = ops._compute_dtype([*student, *teacher])
        loss = self._loss(student, teacher, [], parts, regions, options, save)
        saved = [_new((n,), dtype) for n in loss.lay_out([0, 0, 0])]
        loss.lay_out([x.data_ptr() for x in saved[:3]])
        losses = [_new((), dtype) for _ in range(3)]
        scratch = _new((loss.scratch(),), torch.uint8)
        loss.forward(scratch.data_ptr(), [x.data_ptr() for x in losses])
        _check_guards()
        return *losses, saved if save else [_new((0,), dtype) for _ in saved]

    def sea_loss_pool(self, student, teacher, parts, regions, localization_temperature):
        dtype, levels = ops._compute_dtype([*student, *teacher]), len(student) // len(parts)
        loss = self._loss(student, teacher, [], parts, regions, (1.0, localization_temperature, False), False)
        loss.only(1)
        anchors = _new((loss.lay_out_anchors(levels, 0),), dtype)
        loss.lay_out_anchors(levels, anchors.data_ptr())
        softmax, localization = _new((loss.lay_out([0, 0, 0])[2],), dtype), _new((), dtype)
        loss.lay_out([0, 0, softmax.data_ptr()])
        scratch = _new((loss.scratch(),), torch.uint8)
        loss.forward(scratch.data_ptr(), [0, 0, localization.data_ptr()])
        _check_guards()
        return anchors, localization, softmax

    def sea_loss_compare(self, student, teacher, parts, regions, anchors, temperature, detach_anchors, save, _):
        dtype, levels = anchors.dtype, len(student) // len(parts)
        loss = self._loss(student, teacher, [], parts, regions, (temperature, 1.0, detach_anchors), save)
        loss.only(2)
        loss.lay_out_anchors(levels, anchors.data_ptr())
        saved = [_new((n,), dtype) for n in loss.lay_out([0, 0, 0])[:2]]
        loss.lay_out([*(x.data_ptr() for x in saved), 0])
        losses = [_new((), dtype) for _ in range(2)]
        scratch = _new((loss.scratch(),), torch.uint8)
        loss.forward(scratch.data_ptr(), [*(x.data_ptr() for x in losses), 0])
        _check_guards()
        return *losses, *(saved if save else [_new((0,), dtype) for _ in saved])

    def sea_loss_backward(self, anchor, distance, localization, student, teacher, parts, regions, saved, *options):
        upstream = [0 if x is None else x.data_ptr() for x in (anchor, distance, localization)]
        gradient = [_gradient(x) for x in student]
        loss = self._loss(student, teacher, gradient, parts, regions, options, True)
        loss.lay_out([x.data_ptr() for x in saved[:3]])
        loss.backward(upstream)
        _check_guards()
        return gradient


def install(**options):
    """Compiles the kernels (options: of build.load) and registers them; returns the module."""
    kernels = build.load("kernels", ["kernels.cpp"], **options)
    operators = Operators(kernels)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of what is the purpose here
        for name in ops.KERNELS:
            _library.impl(name, getattr(operators, name), "CPU", allow_override=True)
    return kernels


def uninstall():
    global _library
    _library._destroy()
    _library = torch.library.Library("sea_kernels", "IMPL")
