"""How the bundled tiny DeepSeek-V4 is trained; `scripts/train_tiny_v4.py` is the way in.

text: what is learned from and what must stay out. model: the trunk and the two things in it that a
language-model loss cannot train. muon: the optimiser. mtp: the draft stage. loop: schedule and
resumable state. export: the released layout. heldout: what the written checkpoint is worth.

V4.1 shares text, loop and optimiser; what differs has a file per idea: v41_engram, v41_parts,
v41_attention, v41_model (the trunk, under official names), v41_draft (DSpark), v41_phases (losses,
rounding at the end), v41_formats, v41_export, v41_heldout, v41_start (from a trained V4). families:
the two behind one face.
"""
