"""Engines that run the trunk of a vision tower in the encode pass, one file each, behind one class (base.py)."""
