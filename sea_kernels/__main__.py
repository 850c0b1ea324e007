"""`python -m sea_kernels`: what was built, what runs where, and why not where not."""

import platform

import torch

from . import ops


def report() -> str:
    error = ops.LIBRARY_ERROR
    info = {"cpu": [], "cpu_available": [], "cuda": None, "why_no_cuda": "unknown"} if error else ops.build_info()
    missing = "the library did not load"
    why_not = {"CPU": missing if error else "not compiled", "CUDA": missing if error else info["why_no_cuda"]}
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    unfit = [f"{gpu}: {why}" for i, gpu in enumerate(gpus) if (why := ops.lacks_code(i))]
    lines = {
        "python": platform.python_version(),
        "torch": f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}, GPU {', '.join(gpus) or 'none'}",
        "library": f"{ops.library_path() or 'none'}: {'not loaded: ' + error if error else 'loaded'}",
        "CPU compiled": " ".join(info["cpu"]) or missing,
        "CPU available": " ".join(info["cpu_available"]) or missing,
        "CPU in use": info.get("cpu_in_use", missing),
        "CUDA compiled": f"{info['cuda']} for {' '.join(info['architectures'])}" if info["cuda"] else why_not["CUDA"],
        **({"cannot run on": "; ".join(unfit)} if unfit else {}),
        "backend": ops.current_backend(),
        "": "",
        "operator": "CPU  CUDA",
    }
    for name in ops.KERNELS:
        runs = {device: not error and ops.has_kernel(name, device) for device in why_not}
        lines[name] = "  ".join("yes" if runs[device] else f"no: {why}" for device, why in why_not.items())
    width = max(map(len, lines))
    return "\n".join(f"{name:<{width}}  {text}".rstrip() for name, text in lines.items())


if __name__ == "__main__":
    print(report())
