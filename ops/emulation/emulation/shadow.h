// Who last wrote and read each byte of a memory, as disjoint intervals.
#pragma once

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <map>
#include <vector>

namespace emulation {

// The seq-th instruction of a component (core index * 8 + pipe); seq 0 means none.
struct Epoch {
    uint32_t component = 0, seq = 0;
};

class Shadow {
public:
    struct Segment {
        uint64_t end = 0;
        Epoch write;
        uint64_t stamp = 0;             // the launch's count of writes when `write` happened
        std::vector<Epoch> reads;       // since `write`, the last one of each component
    };

    // conflict(epoch, earlierIsWrite) is asked about every earlier access that this one would have to follow.
    template <class Conflict>
    void Read(uint64_t begin, uint64_t end, Epoch me, Conflict&& conflict) {
        auto it = SplitAt(begin);
        for (uint64_t at = begin; at < end; ++it) {
            if (it == segments_.end() || it->first > at) {               // never touched: initial data of a GM region
                Segment fresh;
                fresh.end = it == segments_.end() ? end : std::min(end, it->first);
                it = segments_.emplace_hint(it, at, std::move(fresh));
            } else if (it->second.end > end) {
                SplitAt(end);
            }
            Segment& segment = it->second;
            if (segment.write.seq) conflict(segment.write, true);
            bool found = false;
            for (Epoch& read : segment.reads) {
                if (read.component != me.component) continue;
                read.seq = me.seq;
                found = true;
            }
            if (!found) segment.reads.push_back(me);
            at = segment.end;
        }
    }

    template <class Conflict>
    void Write(uint64_t begin, uint64_t end, Epoch me, uint64_t stamp, Conflict&& conflict) {
        auto it = SplitAt(begin);
        SplitAt(end);
        auto first = it;
        for (; it != segments_.end() && it->first < end; ++it) {
            if (it->second.write.seq) conflict(it->second.write, true);
            for (const Epoch& read : it->second.reads) conflict(read, false);
        }
        if (first != segments_.end() && first->first == begin) {         // reuse the first node
            first->second.end = end;
            first->second.write = me;
            first->second.stamp = stamp;
            first->second.reads.clear();
            segments_.erase(std::next(first), it);
        } else {
            segments_.erase(first, it);
            Segment fresh;
            fresh.end = end;
            fresh.write = me;
            fresh.stamp = stamp;
            segments_.emplace(begin, std::move(fresh));
        }
    }

    template <class Visit>
    void ForEach(uint64_t begin, uint64_t end, Visit&& visit) {
        auto it = SplitAt(begin);
        SplitAt(end);
        for (; it != segments_.end() && it->first < end; ++it) visit(it->second);
    }

private:
    // The first segment at or after `at`, once no segment straddles it.
    std::map<uint64_t, Segment>::iterator SplitAt(uint64_t at) {
        auto next = segments_.lower_bound(at);
        if (next == segments_.begin() || (next != segments_.end() && next->first == at)) return next;
        auto before = std::prev(next);
        if (before->second.end <= at) return next;
        Segment tail = before->second;
        before->second.end = at;
        return segments_.emplace_hint(next, at, std::move(tail));
    }

    std::map<uint64_t, Segment> segments_;
};

}  // namespace emulation
