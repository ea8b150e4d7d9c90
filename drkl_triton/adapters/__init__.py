"""Drop-in replacements for the losses of other distillation codebases, a module for each:

- ``drkl_triton.adapters.trl``: TRL's ``generalized_jsd_loss``, and a GKD trainer for DRKL;
- ``drkl_triton.adapters.distillm``: the loss interface of DistiLLM.

None is imported by ``import drkl_triton``. docs/migrate.md shows each before and after.
"""
