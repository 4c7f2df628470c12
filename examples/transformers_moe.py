"""A transformers MoE model whose experts are spread over the ranks by qcomm: a few steps of training, then generation.

Needs `pip install -e ".[transformers]"`. Run it under a launcher, on GPUs or the CPU:

    torchrun --nproc-per-node 2 examples/transformers_moe.py
    mpirun -n 2 python examples/transformers_moe.py
"""

import logging
import tempfile

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, Qwen3MoeConfig
from transformers.distributed import DistributedConfig
from transformers.utils import logging as transformers_logging

import qcomm.integrations.transformers  # registers "qcomm"
from qcomm.bootstrap import Launch, process_group

STEPS, SEQUENCES, LENGTH, VOCABULARY = 12, 8, 24, 32


def make_model(folder: str, launch: Launch) -> torch.nn.Module:
    """Makes a small random model on rank 0, and loads a share of it on every rank."""
    if launch.rank == 0:
        config = Qwen3MoeConfig(
            vocab_size=VOCABULARY,
            hidden_size=128,
            intermediate_size=256,
            moe_intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            num_experts=4 * launch.num_ranks,
            num_experts_per_tok=2,
            bos_token_id=0,
            eos_token_id=None,
            pad_token_id=0,
        )
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    dist.barrier()
    return AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.bfloat16,
        distributed_config=DistributedConfig(
            fsdp_size=launch.num_ranks, ep_size=launch.num_ranks, ep_implementation="qcomm"
        ),
    )


def counting(starts: torch.Tensor, length: int) -> torch.Tensor:
    """Sequences that count upwards: [sequences, length]."""
    return (starts[:, None] + torch.arange(length, device=starts.device)) % VOCABULARY


def main() -> None:
    transformers_logging.disable_progress_bar()
    with process_group() as launch:
        if launch.rank == 0:
            logging.basicConfig(format="%(message)s")
            logging.getLogger("qcomm").setLevel(logging.INFO)
        folders = [tempfile.mkdtemp(prefix="qcomm-moe-") if launch.rank == 0 else None]
        dist.broadcast_object_list(folders)
        model = make_model(str(folders[0]), launch)

        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        torch.manual_seed(launch.rank)  # every rank has a batch of its own
        for step in range(STEPS):
            tokens = counting(torch.randint(VOCABULARY, (SEQUENCES,), device=launch.device), LENGTH)
            loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if launch.rank == 0:
                print(f"step {step}: loss {loss.item():.3f}")

        prompt = counting(torch.tensor([launch.rank], device=launch.device), 4)
        out = model.eval().generate(prompt, max_new_tokens=8, do_sample=False, synced_gpus=True)
        print(f"rank {launch.rank} generated {out[0].tolist()}", flush=True)
        qcomm.integrations.transformers.close()


if __name__ == "__main__":
    main()
