"""A ring: a small feature cache that encoders fill ahead of one trainer, and empty behind it.

The trainer says which images its steps need, in order, and up to which step it will never go back. Encoders encode what is
missing, nearest first, and free what is needed last, so that the whole stays within a bound. docs/modes.md tells how to
use one.

An encoder takes nothing for granted: it always looks for the first step that lacks an image. So a record may go at any
time, through damage or to make room for a nearer one; it is found missing and made again.
"""
