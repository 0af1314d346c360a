#!/bin/sh
# What a hypervisor can break in a Linux guest, seen from user space. Prints a line per case and a summary.

passed=0
failed=0

# check NAME WHY COMMAND...: the case NAME holds if COMMAND succeeds.
check() {
    name=$1
    why=$2
    shift 2
    if "$@"; then
        echo "ok $name"
        passed=$((passed + 1))
    else
        echo "FAIL $name: $why"
        failed=$((failed + 1))
    fi
}

# Hundredths of a second since boot, by the kernel's clock source.
now_cs() {
    read -r up _ < /proc/uptime
    whole=${up%.*}
    part=${up#*.}
    echo $((whole * 100 + ${part#0}))
}

count_forks() {
    n=0
    while [ $n -lt 200 ]; do
        (exit $((n % 100)))
        [ $? -eq $((n % 100)) ] || return 1
        n=$((n + 1))
    done
}

many_children() {
    pids=
    for n in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16; do
        (sleep 0.1; exit "$n") &
        pids="$pids $!"
    done
    n=0
    for pid in $pids; do
        n=$((n + 1))
        wait "$pid"
        [ $? -eq $n ] || return 1
    done
}

exec_programs() {
    n=0
    while [ $n -lt 50 ]; do
        [ "$(/bin/busybox echo $n)" = $n ] || return 1
        n=$((n + 1))
    done
}

pipeline() {
    [ "$(seq 1 20000 | grep 7 | sort -n | tail -n 1)" = 19997 ]
}

anonymous_memory() {
    # Buffers of this size come from mmap and are touched from end to end.
    [ "$(dd if=/dev/zero bs=32M count=2 2>/dev/null | wc -c)" = 67108864 ]
}

mapped_file() {
    mkdir -p /tmp/bin && cp /bin/busybox /tmp/bin || return 1
    /tmp/bin/busybox cat /proc/self/maps | grep -q 'r-xp.* /tmp/bin/busybox$'
}

tmpfs_files() {
    n=0
    while [ $n -lt 100 ]; do
        echo "content $n" > /tmp/file$n
        n=$((n + 1))
    done
    [ "$(cat /tmp/file* | sort -u | wc -l)" = 100 ] && rm /tmp/file* && [ ! -e /tmp/file7 ]
}

tmpfs_data() {
    seq 1 200000 > /tmp/numbers
    sum=$(md5sum < /tmp/numbers)
    cp /tmp/numbers /tmp/again
    [ "$sum" = "$(md5sum < /tmp/again)" ] && [ "$(seq 1 200000 | md5sum)" = "$sum" ]
}

copy_on_write() {
    value=parent
    (value=child; [ $value = child ]) && [ $value = parent ]
}

signals() {
    caught=0
    trap 'caught=$((caught + 1))' USR1
    for n in 1 2 3 4 5; do
        kill -USR1 $$
    done
    trap - USR1
    [ $caught -eq 5 ]
}

job_control() {
    sleep 100 &
    kill -STOP $!
    # It stops when it next runs.
    tries=0
    until grep -q '^State:.T' /proc/$!/status; do
        tries=$((tries + 1))
        [ $tries -gt 500 ] && { kill -KILL $!; return 1; }
        usleep 10000
    done
    kill -CONT $!
    kill $!
    wait $!
    [ $? -eq 143 ]
}

clock_source() {
    echo "clock source: $(cat /sys/devices/system/clocksource/clocksource0/current_clocksource)" \
        "of $(cat /sys/devices/system/clocksource/clocksource0/available_clocksource)"
    grep -q '^tsc$' /sys/devices/system/clocksource/clocksource0/current_clocksource
}

# The clock is the TSC; the timer that ends a sleep is the local APIC's. They must agree. A busy host may end a sleep
# late but never early, so the best of five counts, less what it takes to start a program that does not sleep.
sleep_agrees() {
    best=100000
    idle=100000
    for n in 1 2 3 4 5; do
        start=$(now_cs)
        sleep 0
        between=$(now_cs)
        sleep 0.5
        end=$(now_cs)
        took=$((end - between))
        [ $took -lt 49 ] && { echo "a sleep of 0.50 s took 0.$took s"; return 1; }
        [ $took -lt $best ] && best=$took
        [ $((between - start)) -lt $idle ] && idle=$((between - start))
    done
    echo "the best sleep of 0.50 s took ${best}0 ms, and one of none ${idle}0 ms"
    [ $((best - idle)) -le 60 ]
}

# The CMOS clock against the TSC: three seconds of the one are three of the other.
rtc_agrees() {
    [ -r /sys/class/rtc/rtc0/since_epoch ] || { echo "no rtc0"; return 1; }
    second=$(cat /sys/class/rtc/rtc0/since_epoch)
    tries=0
    while [ "$(cat /sys/class/rtc/rtc0/since_epoch)" = "$second" ]; do
        tries=$((tries + 1))
        [ $tries -gt 100000 ] && return 1
    done
    start=$(now_cs)
    while [ "$(cat /sys/class/rtc/rtc0/since_epoch)" -lt $((second + 4)) ]; do
        usleep 10000
    done
    took=$(($(now_cs) - start))
    echo "three seconds of the CMOS clock took ${took}0 ms"
    [ $took -ge 290 ] && [ $took -le 360 ]
}

time_goes_forward() {
    last=$(now_cs)
    n=0
    while [ $n -lt 300 ]; do
        this=$(now_cs)
        [ "$this" -ge "$last" ] || return 1
        last=$this
        n=$((n + 1))
    done
}

timer_interrupts() {
    before=$(grep -E 'LOC:|timer' /proc/interrupts | awk '{s += $2} END {print s}')
    sleep 0.3
    after=$(grep -E 'LOC:|timer' /proc/interrupts | awk '{s += $2} END {print s}')
    [ "$after" -gt "$before" ]
}

floating_point() {
    # Two processes at once, so that each switch between them must keep their registers apart.
    sum='BEGIN { s = 0; for (i = 1; i <= 60000; i++) s += 1 / (i * i); printf "%.9f", s }'
    awk "$sum" > /tmp/fp1 &
    awk "$sum" > /tmp/fp2
    wait
    [ "$(cat /tmp/fp1)" = 1.644917400 ] && [ "$(cat /tmp/fp2)" = 1.644917400 ]
}

# That a CPU is of a kind with weaknesses is not the hypervisor's doing.
no_complaints() {
    ! dmesg | grep -v 'RETBleed: ' | grep -E 'BUG|Oops|WARNING|Call Trace|soft lockup|stall|unstable|Marking TSC|not working'
}

check fork "a child did not return its status" count_forks
check fork_many "a child's status was lost" many_children
check fork_copy_on_write "a child changed its parent's memory" copy_on_write
check exec "a program's output was wrong" exec_programs
check pipe "a pipeline lost data" pipeline
check mmap_anonymous "64 MiB of mapped memory were not passed on" anonymous_memory
check mmap_file "a program is not mapped from its file" mapped_file
check tmpfs_files "files in tmpfs were lost" tmpfs_files
check tmpfs_data "data in tmpfs changed" tmpfs_data
check signals "a signal was lost" signals
check job_control "a process was not stopped or continued" job_control
check floating_point "a sum was wrong" floating_point
check clock_source "Linux does not trust the TSC" clock_source
check clock_forward "time went backwards" time_goes_forward
check timer_interrupts "no timer interrupt in 0.3 s" timer_interrupts
check sleep_accuracy "sleep and TSC disagree" sleep_agrees
check rtc_accuracy "the CMOS clock and the TSC disagree" rtc_agrees
check kernel_log "the kernel complained" no_complaints
echo "done $passed passed, $failed failed"
[ $failed -eq 0 ]
