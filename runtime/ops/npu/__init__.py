"""Ascend back-end: torch_npu's operators behind the operation table. Imported when the device is `npu`, not before."""
