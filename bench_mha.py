import copy, statistics, sys, time, warnings
import torch
from torch import nn
import torch.nn.functional as F
warnings.simplefilter("ignore")
from fused_ewclora.benchmarks.extras import prepare_torchvision; prepare_torchvision()
import torchvision, peft
import fused_ewclora as fe
torch.manual_seed(0); torch.set_num_threads(1)
depth = int(sys.argv[1]) if len(sys.argv) > 1 else 4
def build():
    torch.manual_seed(0)
    return torchvision.models.VisionTransformer(224, 16, depth, 12, 768, 3072)
plain = build(); plain.requires_grad_(False); plain.heads.requires_grad_(True)
deep = build(); deep.requires_grad_(False); deep.heads.requires_grad_(True); deep.encoder.layers[0].self_attention.in_proj_bias.requires_grad_(True)
from fused_ewclora.layers.attention import CallingMultiheadAttention
best = copy.deepcopy(deep)
for mod in best.modules():
    if type(mod) is nn.MultiheadAttention: mod.__class__ = CallingMultiheadAttention
ours = build(); fe.inject(ours, fe.LoRAConfig(r=10, target_modules=["self_attention"], slices=("k","v"))); ours.heads.requires_grad_(True)
whole = build(); fe.inject(whole, fe.LoRAConfig(r=10, target_modules=["self_attention", "out_proj"])); whole.heads.requires_grad_(True)
pm = peft.get_peft_model(build(), peft.LoraConfig(r=10, lora_alpha=10, target_modules=["self_attention"])); pm.base_model.model.heads.requires_grad_(True)
models = {"plain": plain, "plain, dx": deep, "best, dx": best, "kv": ours, "in+out": whole, "peft": pm}
x, y = torch.randn(8,3,224,224), torch.randint(1000,(8,))
def step(m):
    m.zero_grad(set_to_none=True)
    F.cross_entropy(m(x), y).backward()
times = {n: [] for n in models}
for m in models.values():
    nn.init.normal_([p for n,p in m.named_parameters() if "heads.head.weight" in n][0], std=.02)
    step(m)
for _ in range(int(sys.argv[2]) if len(sys.argv)>2 else 5):
    for n, m in models.items():
        t = time.process_time(); step(m); times[n].append(time.process_time() - t)
med = {n: min(t) for n, t in times.items()}
for n in med: print(f"{n:10} {med[n]:.3f} s  {statistics.median(times[n]):.3f}  x plain {med[n]/med['plain']:.3f}  x plain,dx {med[n]/med['plain, dx']:.3f}  x best {med[n]/med['best, dx']:.3f}")
