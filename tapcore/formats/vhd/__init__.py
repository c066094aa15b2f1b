"""VHD: the format of Virtual PC, Hyper-V, Azure and XenServer.

    layout.py      structures; footer and header, parsed and validated; sizes and geometry
    locators.py    where the parent of a differencing image is
    load.py        what an image says, put together from its copies
    mapping.py     guest offset → extents, over the BAT and cached sector bitmaps
    driver.py      the driver: open, repair, read, write, close
    changes.py     writes, zeroes and discards that change the mapping, and the order in which they reach the file
    create.py      a new image
    check.py       errors and leaks, and their repair
    tools.py       all of it for td-img
"""
