"""Are hosts, devices, links and the file system fit for a run, and does its launch fit its configuration?

`finding` is what is said of a misfit; `place` who this rank is, under any launcher. `hosts` compares versions
and clocks, `speed` computes a known product, `links` sends, `files` tries what checkpoints rely on, `examine`
does all of it, and `launch` asks before anything is queued.
"""
