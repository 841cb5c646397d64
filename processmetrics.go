// What /metrics tells of the process and of Go, under the names that Prometheus' own clients use.

package main

import (
	"bytes"
	"os"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"strconv"
	"sync"
	"syscall"
	"time"
)

// goMetrics are the metrics of Go that are told as they are.
var goMetrics = []struct{ name, kind, help, source string }{
	{"go_goroutines", "gauge", "Goroutines.", "/sched/goroutines:goroutines"},
	{"go_gc_cycles_total", "counter", "Cycles of the collector.", "/gc/cycles/total:gc-cycles"},
	{"go_gc_gogc_percent", "gauge", "GOGC.", "/gc/gogc:percent"},
	{"go_gc_gomemlimit_bytes", "gauge", "GOMEMLIMIT, or what follows from the memory.", "/gc/gomemlimit:bytes"},
	{"go_sched_gomaxprocs_threads", "gauge", "GOMAXPROCS.", "/sched/gomaxprocs:threads"},
	{"go_cpu_classes_gc_total_cpu_seconds_total", "counter", "About the processor time of the collector.", "/cpu/classes/gc/total:cpu-seconds"},
	{"go_memstats_alloc_bytes", "gauge", "Bytes of objects that are in use, or not collected yet.", "/memory/classes/heap/objects:bytes"},
	{"go_memstats_alloc_bytes_total", "counter", "Bytes of objects that were allocated.", "/gc/heap/allocs:bytes"},
	{"go_memstats_mallocs_total", "counter", "Objects that were allocated.", "/gc/heap/allocs:objects"},
	{"go_memstats_frees_total", "counter", "Objects that were freed.", "/gc/heap/frees:objects"},
	{"go_memstats_heap_objects", "gauge", "Objects that are in use, or not collected yet.", "/gc/heap/objects:objects"},
	{"go_memstats_heap_released_bytes", "gauge", "Bytes that were given back to the system.", "/memory/classes/heap/released:bytes"},
	{"go_memstats_next_gc_bytes", "gauge", "Bytes of the heap at which the collector runs next.", "/gc/heap/goal:bytes"},
	{"go_memstats_stack_inuse_bytes", "gauge", "Bytes of stacks.", "/memory/classes/heap/stacks:bytes"},
	{"go_memstats_sys_bytes", "gauge", "Bytes that Go has of the system, those included that it gave back.", "/memory/classes/total:bytes"},
}

// goSums are those that are a sum of such metrics.
var goSums = []struct {
	name, help string
	sources    []string
}{
	{"go_memstats_heap_idle_bytes", "Bytes of the heap that are not used.",
		[]string{"/memory/classes/heap/free:bytes", "/memory/classes/heap/released:bytes"}},
	{"go_memstats_heap_inuse_bytes", "Bytes of the heap that are used.",
		[]string{"/memory/classes/heap/objects:bytes", "/memory/classes/heap/unused:bytes"}},
}

// writeProcess writes what is to be told of the process and of Go.
func writeProcess(t *metricsText) {
	t.begin("go_info", "gauge", "1; the label says which Go it is.")
	t.number(1, "version", runtime.Version())
	threads, _ := runtime.ThreadCreateProfile(nil)
	t.gaugeOf("go_threads", "Threads that were made.", uint64(threads))
	writeGo(t)
	writePauses(t)
	writeSystem(t)
}

func writeGo(t *metricsText) {
	var samples []metrics.Sample
	for _, m := range goMetrics {
		samples = append(samples, metrics.Sample{Name: m.source})
	}
	for _, sum := range goSums {
		for _, source := range sum.sources {
			samples = append(samples, metrics.Sample{Name: source})
		}
	}
	metrics.Read(samples)
	for i, m := range goMetrics {
		t.begin(m.name, m.kind, m.help)
		t.value(valueOf(&samples[i]))
	}
	rest := samples[len(goMetrics):]
	for _, sum := range goSums {
		all := 0.0
		for range sum.sources {
			all += valueOf(&rest[0])
			rest = rest[1:]
		}
		t.gauge(sum.name, sum.help, all)
	}
}

// valueOf is the value of a sample; 0, if this Go does not have it.
func valueOf(s *metrics.Sample) float64 {
	switch s.Value.Kind() {
	case metrics.KindUint64:
		return float64(s.Value.Uint64())
	case metrics.KindFloat64:
		return s.Value.Float64()
	}
	return 0
}

// writePauses writes the pauses that the collector has made.
func writePauses(t *metricsText) {
	s := debug.GCStats{PauseQuantiles: make([]time.Duration, 5)}
	debug.ReadGCStats(&s)
	t.begin("go_gc_duration_seconds", "summary", "Pauses of the collector, and the quantiles of the last ones.")
	for i, quantile := range []string{"0", "0.25", "0.5", "0.75", "1"} {
		t.value(s.PauseQuantiles[i].Seconds(), "quantile", quantile)
	}
	t.suffixed("_sum", s.PauseTotal.Seconds(), nil)
	t.suffixed("_count", float64(s.NumGC), nil)
	last := 0.0
	if s.NumGC > 0 {
		last = float64(s.LastGC.UnixNano()) / 1e9
	}
	t.gauge("go_memstats_last_gc_time_seconds", "When the collector last ran, since 1970; 0: it has not.", last)
}

// writeSystem writes what the system says of the process. What it does not say is left out, as it
// is on other systems than Linux.
func writeSystem(t *metricsText) {
	var usage syscall.Rusage
	if syscall.Getrusage(syscall.RUSAGE_SELF, &usage) == nil {
		used := time.Duration(usage.Utime.Nano() + usage.Stime.Nano())
		t.begin("process_cpu_seconds_total", "counter", "Processor time of the process.")
		t.value(used.Seconds())
	}
	t.gaugeOf("process_max_fds", "Files that the process may have open.", openFiles())
	if open, err := os.ReadDir("/proc/self/fd"); err == nil {
		t.gaugeOf("process_open_fds", "Files that the process has open.", uint64(len(open)-1)) // but for the directory
	}
	if virtual, resident, ok := processMemory(); ok {
		t.gaugeOf("process_virtual_memory_bytes", "Virtual memory of the process.", virtual)
		t.gaugeOf("process_resident_memory_bytes", "Resident memory of the process.", resident)
	}
	if began, ok := processBegan(); ok {
		t.gauge("process_start_time_seconds", "When the process began, since 1970.", began)
	}
}

// processMemory is how many bytes of memory the process has.
func processMemory() (virtual, resident uint64, ok bool) {
	text, err := os.ReadFile("/proc/self/statm")
	fields := bytes.Fields(text)
	if err != nil || len(fields) < 2 {
		return 0, 0, false
	}
	virtual, err = strconv.ParseUint(string(fields[0]), 10, 64)
	if err != nil {
		return 0, 0, false
	}
	resident, err = strconv.ParseUint(string(fields[1]), 10, 64)
	page := uint64(os.Getpagesize())
	return virtual * page, resident * page, err == nil
}

// processBegan is when the process began, in seconds since 1970: it does not change.
var processBegan = sync.OnceValues(func() (seconds float64, ok bool) {
	const ticksPerSecond = 100 // of /proc, on all of Go's architectures
	text, err := os.ReadFile("/proc/self/stat")
	_, afterName, hasName := bytes.Cut(text, []byte(") "))
	fields := bytes.Fields(afterName)
	if err != nil || !hasName || len(fields) < 20 {
		return 0, false
	}
	ticks, err := strconv.ParseUint(string(fields[19]), 10, 64) // since the system began
	if err != nil {
		return 0, false
	}
	boot, ok := systemBegan()
	return boot + float64(ticks)/ticksPerSecond, ok
})

// systemBegan is when the system began, in seconds since 1970.
func systemBegan() (seconds float64, ok bool) {
	text, err := os.ReadFile("/proc/stat")
	if err != nil {
		return 0, false
	}
	for line := range bytes.Lines(text) {
		rest, isIt := bytes.CutPrefix(line, []byte("btime "))
		if !isIt {
			continue
		}
		seconds, err = strconv.ParseFloat(string(bytes.TrimSpace(rest)), 64)
		return seconds, err == nil
	}
	return 0, false
}
