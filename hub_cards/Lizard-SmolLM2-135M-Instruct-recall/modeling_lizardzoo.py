"""Loads this model with trust_remote_code=True. It needs the package: pip install lizardzoo

After `import lizardzoo` the model loads without trust_remote_code, and this file is not used.
"""

from lizardzoo.adapters.llama import LizardLlamaConfig, LizardLlamaForCausalLM, LizardLlamaModel

__all__ = ["LizardLlamaConfig", "LizardLlamaModel", "LizardLlamaForCausalLM"]
