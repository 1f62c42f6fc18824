"""ChatGLM-6B as a family of its own: transformers has no class for it, and code from a model folder never runs here."""

import importlib

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from pruners.chatglm.configuration_chatglm import ChatGLMConfig, read_tokens
from pruners.chatglm.modeling_chatglm import ChatGLMForCausalLM, ChatGLMModel
from pruners.chatglm.tokenization_chatglm import ChatGLMTokenizer

__all__ = ["ChatGLMConfig", "ChatGLMForCausalLM", "ChatGLMModel", "ChatGLMTokenizer", "read_tokens"]

AutoConfig.register("chatglm", ChatGLMConfig, exist_ok=True)
AutoModelForCausalLM.register(ChatGLMConfig, ChatGLMForCausalLM, exist_ok=True)
AutoTokenizer.register(ChatGLMConfig, tokenizer_class=ChatGLMTokenizer, exist_ok=True)
ChatGLMConfig.register_for_auto_class()  # so that saving copies the modules and names them
ChatGLMForCausalLM.register_for_auto_class("AutoModelForCausalLM")
ChatGLMTokenizer.register_for_auto_class("AutoTokenizer")
importlib.import_module("pruners.checkpoint")  # which knows all families, and was not imported for this first import
