import time, warnings, torch
warnings.simplefilter("ignore")
from fused_ewclora.benchmarks.extras import prepare_torchvision; prepare_torchvision()
import torchvision, open_clip
import fused_ewclora as fe
from torch import nn
for name, build in {"vit_h_14": lambda: torchvision.models.vit_h_14(), "ViT-L-14": lambda: open_clip.create_model("ViT-L-14")}.items():
    for cfg in (fe.LoRAConfig(r=10, target_modules=["self_attention","attn"], slices=("k","v")), fe.LoRAConfig(r=10, target_modules="all-linear")):
        with torch.device("cpu"):
            orig = {f: getattr(nn.init, f) for f in ("kaiming_uniform_","xavier_uniform_","normal_","trunc_normal_")}
            for f in orig: setattr(nn.init, f, lambda t, *a, **k: t)
            model = build()
            for f in orig: setattr(nn.init, f, orig[f])
        t = time.perf_counter(); c=time.thread_time(); report = fe.inject(model, cfg); print(name, cfg.target_modules, "inject wall", time.perf_counter()-t, "cpu", time.thread_time()-c, len(report.rows), report.summary["skipped"].keys(), flush=True)
        if "all" in cfg.target_modules:
            import cProfile, pstats
            fe.eject(model, merge=False)
            p = cProfile.Profile(); p.enable(); fe.inject(model, cfg); p.disable(); pstats.Stats(p).sort_stats("cumtime").print_stats(25)
        del model
