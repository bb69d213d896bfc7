"""Attention over packed chats: the public names."""

from .device_plan import DevicePlan, plan_attention
from .interface import attention, attention_reference

__all__ = ["DevicePlan", "attention", "attention_reference", "plan_attention"]
