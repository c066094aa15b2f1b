"""td-img: what is done with disk images offline.

    cli.py         the command line; commands.py what its commands do
    legacy.py      the original's tools, in a few lines over the same functions; vhd_util.py its vhd-util
    locate.py      what an argument names: a file of a format, or a chain
    session.py     a loop with chains, and tasks that keep requests under way on them
    walk.py        a disk's pieces in order, by its block status
    copy.py        from one chain to another: the engine of convert, commit and rebase
    convert.py     any to any, into a new file that appears when it is whole
    compare.py     are two disks equal, and where not
    layers.py      commit and rebase: an overlay and what is below it
    ranges.py      read and write ranges of a disk
    describe.py    info and map
    newfile.py     files that appear when they are complete
    progress.py    how far, how fast, how long
"""
