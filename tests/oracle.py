"""What the package computes, pixel by pixel in Python loops and numpy, from the definitions; shares no code with it."""

import math

import numpy as np


def covered(box, stride, y, x, dtype):
    """Is pixel (y, x) covered by the box, given as four numbers?"""

    def axis(low, high, s, u):
        first = np.floor(dtype(low) / dtype(s))
        last = max(np.ceil(dtype(high) / dtype(s)), first + dtype(1)) - 1
        return bool(first <= u <= last)

    return axis(box[1], box[3], stride[0], y) and axis(box[0], box[2], stride[1], x)


def center_of(box, ratio, dtype):
    x1, y1, x2, y2 = (dtype(v) for v in box)
    cx, cy = (x1 + x2) / dtype(2), (y1 + y2) / dtype(2)
    rx, ry = dtype(ratio) * (x2 - x1) / dtype(2), dtype(ratio) * (y2 - y1) / dtype(2)
    return cx - rx, cy - ry, cx + rx, cy + ry


def regions(boxes, labels, shapes, strides, num_classes, ratio=0.5, sizes=None, ignore=None, dtype=np.float32):
    """(classes, masks of every level bool [P, B, H, W], extent [L, B, 2]); boxes, labels, ignore: lists by image"""
    batch = len(boxes)
    present = sorted({c for image in labels for c in image if c >= 0})
    capacity = min(sum(len(image) for image in boxes), num_classes)
    masks = [np.zeros((1 + 2 * capacity, batch, h, w), bool) for h, w in shapes]
    extent = np.zeros((len(shapes), batch, 2), int)
    with np.errstate(all="ignore"):
        for level, ((h, w), stride) in enumerate(zip(shapes, strides)):
            sy, sx = stride if isinstance(stride, (tuple, list)) else (stride, stride)
            for b in range(batch):
                rows, columns = h, w
                if sizes is not None:
                    rows = min(h, math.ceil(dtype(sizes[b][0]) / dtype(sy)))
                    columns = min(w, math.ceil(dtype(sizes[b][1]) / dtype(sx)))
                extent[level, b] = rows, columns
                for y in range(rows):
                    for x in range(columns):
                        in_box = False
                        for box, c in zip(boxes[b], labels[b]):
                            if c < 0 or not covered(box, (sy, sx), y, x, dtype):
                                continue
                            in_box = True
                            center = center_of(box, ratio, dtype)
                            finite = all(np.isfinite(v) for v in center)
                            in_center = finite and covered(center, (sy, sx), y, x, dtype)
                            masks[level][1 + 2 * present.index(c) + (not in_center), b, y, x] = True
                        in_crowd = ignore is not None and any(covered(box, (sy, sx), y, x, dtype) for box in ignore[b])
                        masks[level][0, b, y, x] = not in_box and not in_crowd
    return present + [-1] * (capacity - len(present)), masks, extent


def pixels_of(mask):
    return [tuple(u) for u in np.argwhere(mask)]


def anchors(features, masks):
    """[L][P, C]; features: a list of float64 arrays [B, C, H, W]"""
    out = []
    for f, m in zip(features, masks):
        a = np.zeros((len(m), f.shape[1]))
        for p in range(len(m)):
            inside = pixels_of(m[p])
            for b, y, x in inside:
                a[p] += f[b, :, y, x] / len(inside)
        out.append(a)
    return out


def cosine(f, a):
    nf, na = math.sqrt(f @ f), math.sqrt(a @ a)
    return 0.0 if nf <= 1e-12 or na <= 1e-12 else (f @ a) / (nf * na)


def softmax(z):
    e = np.exp(z - z.max())
    return e / e.sum()


def anchor_loss(student, teacher, masks):
    loss = 0.0
    for a_s, a_t, m in zip(anchors(student, masks), anchors(teacher, masks), masks):
        errors = [((a_s[p] - a_t[p]) ** 2).mean() for p in range(len(m)) if m[p].any()]
        loss += sum(errors) / max(len(errors), 1)
    return loss


def distance_loss(student, teacher, masks, temperature):
    loss = 0.0
    for s, t, a_s, a_t, m in zip(student, teacher, anchors(student, masks), anchors(teacher, masks), masks):
        present = [p for p in range(len(m)) if m[p].any()]
        counted = pixels_of(m.any(0))
        for b, y, x in counted:
            q_s = softmax(np.array([cosine(s[b, :, y, x], a_s[p]) for p in present]) / temperature)
            q_t = softmax(np.array([cosine(t[b, :, y, x], a_t[p]) for p in present]) / temperature)
            loss += (q_t * np.log(q_t / q_s)).sum() / len(counted)
    return loss


def positions(shape, extent, level, b):
    rows, columns = shape if extent is None else extent[level, b]
    return np.s_[:rows, :columns]


def localization_loss(student, teacher, extent, temperature):
    loss = 0.0
    for level, (s, t) in enumerate(zip(student, teacher)):
        for b in range(s.shape[0]):
            inside = positions(s.shape[2:], extent, level, b)
            for c in range(s.shape[1]):
                if s[b, c][inside].size:
                    p_s = softmax(s[b, c][inside].ravel() / temperature)
                    p_t = softmax(t[b, c][inside].ravel() / temperature)
                    loss += temperature**2 / (s.shape[0] * s.shape[1]) * (p_t * np.log(p_t / p_s)).sum()
    return loss


def _spread(grad, f, m, g):
    """dF(u) += sum_p m_p(u) g_p / area_p"""
    for p in range(len(m)):
        inside = pixels_of(m[p])
        for b, y, x in inside:
            grad[b, :, y, x] += g[p] / len(inside)


def anchor_gradient(student, teacher, masks):
    out = []
    for s, a_s, a_t, m in zip(student, anchors(student, masks), anchors(teacher, masks), masks):
        grad = np.zeros_like(s)
        present = sum(bool(mask.any()) for mask in m)
        _spread(grad, s, m, 2 * (a_s - a_t) / (max(present, 1) * s.shape[1]))
        out.append(grad)
    return out


def distance_gradient(student, teacher, masks, temperature, detach_anchors):
    """The closed form; no pixel and no anchor of zero norm"""
    out = []
    for s, t, a_s, a_t, m in zip(student, teacher, anchors(student, masks), anchors(teacher, masks), masks):
        grad, da = np.zeros_like(s), np.zeros_like(a_s)
        present = [p for p in range(len(m)) if m[p].any()]
        counted = pixels_of(m.any(0))
        for b, y, x in counted:
            u = (b, slice(None), y, x)
            cos = np.array([cosine(s[u], a_s[p]) for p in present])
            q_s = softmax(cos / temperature)
            q_t = softmax(np.array([cosine(t[u], a_t[p]) for p in present]) / temperature)
            e = (q_s - q_t) / temperature / len(counted)
            norm = np.linalg.norm(s[u])
            f = s[u] / norm
            h = [a_s[p] / np.linalg.norm(a_s[p]) for p in present]
            grad[u] += (sum(e_p * h_p for e_p, h_p in zip(e, h)) - (e @ cos) * f) / norm
            for p, e_p, h_p, s_p in zip(present, e, h, cos):
                da[p] += e_p * (f - s_p * h_p) / np.linalg.norm(a_s[p])
        if not detach_anchors:
            _spread(grad, s, m, da)
        out.append(grad)
    return out


def localization_gradient(student, teacher, extent, temperature):
    out = []
    for level, (s, t) in enumerate(zip(student, teacher)):
        grad = np.zeros_like(s)
        for b in range(s.shape[0]):
            inside = positions(s.shape[2:], extent, level, b)
            for c in range(s.shape[1]):
                if s[b, c][inside].size:
                    shape = s[b, c][inside].shape
                    p_s = softmax(s[b, c][inside].ravel() / temperature).reshape(shape)
                    p_t = softmax(t[b, c][inside].ravel() / temperature).reshape(shape)
                    grad[b, c][inside] = temperature / (s.shape[0] * s.shape[1]) * (p_s - p_t)
        out.append(grad)
    return out
