// group_epilogue on the CPU: groups side by side, their scores in one piece and in their order.
#include "group_epilogue.h"

#include <algorithm>
#include <vector>

#include "parallel.h"

namespace robust_dpo {
namespace {

// A piece of 64 K tokens takes some 50 µs, several times what waking a thread costs.
constexpr int64_t kPieceTokens = 65536;

// Eight sums, so that an addition need not wait for the one before it; merged in a fixed order.
double response_sum(const GroupEpilogueArgs& a, const float* logps, int64_t begin, int64_t end) {
    constexpr int64_t kLanes = 8;
    double lanes[kLanes] = {};
    int64_t row = begin;
    for (; row + kLanes <= end; row += kLanes)
        for (int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] += counted_logp(a, logps, row + lane);
    for (int64_t lane = 0; row < end; ++row, ++lane) lanes[lane] += counted_logp(a, logps, row);
    double sum = 0.0;
    for (const double lane : lanes) sum += lane;
    return sum;
}

int64_t widest_group(const GroupEpilogueArgs& a) {
    int64_t widest = 0;
    for (int64_t g = a.first_group; g < a.last_group; ++g)
        widest = std::max(widest, a.group_offsets[g + 1] - a.group_offsets[g]);
    return widest;
}

// Sums, loss and derivative of groups [begin, end).
template <class Loss>
void solve_groups(const GroupEpilogueArgs& a, int64_t widest, int64_t begin, int64_t end) {
    std::vector<double> values(static_cast<size_t>(5 * widest));
    double *logp = values.data(), *ref = logp + widest, *length = ref + widest, *ranked_by = length + widest;
    double* derivative = ranked_by + widest;
    std::vector<Memo<double>> memos(static_cast<size_t>(widest));
    for (int64_t g = begin; g < end; ++g) {
        const int64_t first = a.group_offsets[g], size = a.group_offsets[g + 1] - first;
        for (int64_t i = 0; i < size; ++i) {
            const int64_t response = first + i, start = a.seq_offsets[response], stop = a.seq_offsets[response + 1];
            logp[i] = response_sum(a, a.token_logps, start, stop);
            a.logps[response] = static_cast<float>(logp[i]);
            ref[i] = reference_logp(a, response, a.live ? response_sum(a, a.ref_token_logps, start, stop) : 0.0);
            if (a.live) a.ref_logps[response] = static_cast<float>(ref[i]);
            length[i] = a.lengths[response];
            ranked_by[i] = quality(a, response, i);
        }
        const Group<double> group{logp, ref, length, ranked_by, size};
        a.losses[g] = static_cast<float>(solve_group<Loss>(group, loss_options(a), memos.data(), derivative));
        for (int64_t i = 0; i < size; ++i) a.derivative[first + i] = static_cast<float>(derivative[i]);
    }
}

// The chunk's scores into the state.
void advance(const GroupEpilogueArgs& a) {
    double highest = -HUGE_VAL;
    for (int64_t g = a.first_group; g < a.last_group; ++g) {
        const double score = group_score(a, g);
        if (score > highest) highest = score;  // never a NaN, which reaches the sum below
    }
    TiltState<double> state = tilt_state(a);
    state.make_room(highest, a.headroom);
    double total = 0.0;
    for (int64_t g = a.first_group; g < a.last_group; ++g) total += state.weight(group_score(a, g));
    a.state[0] = state.shift;
    a.state[1] = state.total + total;
    a.state[2] = state.rescale;
}

// Coefficients of the rows of groups [begin, end), under the shift now in force.
void write_rows(const GroupEpilogueArgs& a, int64_t begin, int64_t end) {
    const TiltState<double> state = tilt_state(a);
    for (int64_t g = begin; g < end; ++g) {
        const double weight = state.weight(group_score(a, g)) * group_calibration(a, g);
        for (int64_t response = a.group_offsets[g]; response < a.group_offsets[g + 1]; ++response) {
            const float coefficient = row_coefficient(a, response, weight);
            const int64_t start = a.seq_offsets[response], stop = a.seq_offsets[response + 1];
            if (a.counted == nullptr) {
                std::fill(a.coefficients + start, a.coefficients + stop, coefficient);
            } else {
                for (int64_t row = start; row < stop; ++row)
                    a.coefficients[row] = a.counted[row] != 0 ? coefficient : 0.0f;
            }
        }
    }
}

struct Call {
    const GroupEpilogueArgs* args;
    int64_t widest;
};

}  // namespace

void group_epilogue_cpu(const GroupEpilogueArgs& args, int loss, int threads) {
    const int64_t groups = args.last_group - args.first_group;
    if (groups <= 0) {
        if (args.tilted) args.state[2] = 1.0;
        return;
    }
    const int64_t tokens = args.seq_offsets[args.group_offsets[args.last_group]] -
                           args.seq_offsets[args.group_offsets[args.first_group]];
    const int64_t grain = std::max<int64_t>(1, groups * kPieceTokens / std::max<int64_t>(1, tokens));
    const Call call{&args, widest_group(args)};
    RangeFunction solve = nullptr;
    with_loss(loss, [&](auto chosen) {
        solve = [](const void* context, int64_t begin, int64_t end) {
            const Call& c = *static_cast<const Call*>(context);
            solve_groups<decltype(chosen)>(*c.args, c.widest, c.args->first_group + begin, c.args->first_group + end);
        };
    });
    parallel_ranges(groups, grain, threads, solve, &call);
    if (!args.tilted) return;
    advance(args);
    parallel_ranges(
        groups, grain, threads,
        [](const void* context, int64_t begin, int64_t end) {
            const GroupEpilogueArgs& a = *static_cast<const Call*>(context)->args;
            write_rows(a, a.first_group + begin, a.first_group + end);
        },
        &call);
}

}  // namespace robust_dpo
