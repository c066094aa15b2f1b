"""qcow2, versions 2 and 3. Specification: https://www.qemu.org/docs/master/interop/qcow2.html

    layout.py      structures; the header, parsed and validated
    mapping.py     guest offset → extents, over cached tables
    packed.py      compressed clusters
    refcounts.py   which host clusters are in use; allocation
    driver.py      the driver: open, read, flush, close
    changes.py     the driver's other half: writes, zeroes, discards that change the mapping
    create.py      a new image
    pack.py        a new image, compressed, from front to back
    counts.py      references to each cluster of the file
    walk.py        … counted, by following every table
    check.py       errors and leaks found, and repaired
    rewrite.py     another image made of the one in the file, and switched to at once
    header.py      changes of the header; the backing file's name
    snapshots.py   internal snapshots
    resize.py      another size for the disk
"""
