"""How the bundled tiny DeepSeek-V4 is trained; `scripts/train_tiny_v4.py` is the way in.

text: what is learned from and what must stay out. model: the trunk and the two things in it that a
language-model loss cannot train. muon: the optimiser. mtp: the draft stage. loop: schedule and
resumable state. export: the released layout. heldout: what the written checkpoint is worth.
"""
