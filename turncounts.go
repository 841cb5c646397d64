// What is counted of the loop's turns, and of the disk's writer, besides what MetricsResponse has.

package main

import "time"

// turnCounts are of the loop. It alone adds to them; any goroutine may read them, also while the
// loop hangs.
type turnCounts struct {
	seconds        *histogram // that turns took
	proposalWrites *histogram // writes of a proposal, each time it is proposed
	roundReads     *histogram // reads that share a round
}

func newTurnCounts() turnCounts {
	return turnCounts{
		seconds: newTimes(50*time.Microsecond, 100*time.Microsecond, 250*time.Microsecond, 500*time.Microsecond,
			time.Millisecond, 2500*time.Microsecond, 5*time.Millisecond, 10*time.Millisecond, 25*time.Millisecond,
			50*time.Millisecond, 100*time.Millisecond, 250*time.Millisecond, time.Second, 5*time.Second),
		proposalWrites: newSizes(4, 16<<10),
		roundReads:     newSizes(4, 16<<10),
	}
}

// diskCounts are of a data directory. Whoever writes there adds to them; any goroutine may read them.
type diskCounts struct {
	syncSeconds     *histogram // that the log's batches took to be synced, once they were written
	batchBytes      *histogram // of these batches, in sectors
	snapshotSeconds *histogram // that it took to save the node's own snapshots, with pauses
}

func newDiskCounts() diskCounts {
	return diskCounts{
		syncSeconds: newTimes(100*time.Microsecond, 250*time.Microsecond, 500*time.Microsecond,
			time.Millisecond, 2500*time.Microsecond, 5*time.Millisecond, 10*time.Millisecond, 25*time.Millisecond,
			50*time.Millisecond, 100*time.Millisecond, 250*time.Millisecond, 500*time.Millisecond,
			time.Second, 2500*time.Millisecond, 5*time.Second, 10*time.Second),
		batchBytes: newHistogram(1, 512, 2<<10, 8<<10, 32<<10, 128<<10, 512<<10, 2<<20, 8<<20, 32<<20),
		snapshotSeconds: newTimes(100*time.Millisecond, 250*time.Millisecond, time.Second, 2500*time.Millisecond,
			10*time.Second, 25*time.Second, 100*time.Second, 250*time.Second, 1000*time.Second),
	}
}

// synced counts a batch of so many bytes that was synced.
func (c *diskCounts) synced(bytes int, took time.Duration) {
	if c == nil {
		return
	}
	c.batchBytes.observe(uint64(bytes))
	c.syncSeconds.observeTime(took)
}
