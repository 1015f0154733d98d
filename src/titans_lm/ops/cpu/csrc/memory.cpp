// The functions that Python calls. The compiler is given their type of number, Scalar.

#include <atomic>
#include <new>
#include <thread>

#include "row_backward.h"
#include "layer_step.h"
#include "segments.h"

// Run jobs on `threads` threads, or as many as the system gives, each with a Worker of its own. Returns 0, or 1 if memory
// ran out. The counter's last atomic operation also makes a worker's streaming stores visible to all threads.
template <class Worker, class Args, class Act>
long run_jobs(const Args& args, long jobs, Act act) {
    std::atomic<long> next{0}, failed{0};
    auto work = [&] {
        try {
            Worker worker(args);
            for (long job; (job = next++) < jobs;) act(worker, job);
        } catch (const std::bad_alloc&) {
            failed = 1;
        }
    };
    std::vector<std::thread> others;
    try {
        for (long i = 1; i < std::min(args.threads, jobs); ++i) others.emplace_back(work);
    } catch (const std::exception&) {
    }
    work();
    for (std::thread& t : others) t.join();
    return failed;
}

template <class Act>
long guarded(Act act) {
    try {
        return act();
    } catch (const std::bad_alloc&) {
        return 1;
    }
}

extern "C" {
long titans_state_size(const ScanArgs<Scalar>* args) {
    return SavedLayout<Scalar>(args->chunk_size, args->widths, args->layers).state_size;
}
long titans_saved_size(const ScanArgs<Scalar>* args) {
    return SavedLayout<Scalar>(args->chunk_size, args->widths, args->layers).saved_size;
}
long titans_forward(const ScanArgs<Scalar>* args) {
    return run_jobs<RowForward<Scalar>>(*args, args->batch * args->heads,
                                        [](RowForward<Scalar>& row, long r) { row.forward(r); });
}
long titans_backward(const ScanArgs<Scalar>* args) {
    return run_jobs<RowBackward<Scalar>>(*args, args->batch * args->heads,
                                         [](RowBackward<Scalar>& row, long r) { row.backward(r); });
}
long titans_decode(const ScanArgs<Scalar>* args) {
    return run_jobs<RowDecoder<Scalar>>(*args, args->batch * args->heads,
                                        [&](RowDecoder<Scalar>& row, long r) { decode_row(*args, row, r); });
}
long titans_layer_step(const long* numbers, const double* scalars) {
    LayerStepArgs<Scalar> args(numbers, scalars);
    return run_jobs<LayerStep<Scalar>>(args, args.batch * args.heads,
                                       [](LayerStep<Scalar>& step, long r) { step.step(r); });
}
long titans_features_forward(const FeatureArgs<Scalar>* args) {
    return run_jobs<FeatureWorker<Scalar>>(*args, args->parts * args->heads,
                                           [](FeatureWorker<Scalar>& worker, long job) { worker.forward(job); });
}
long titans_features_backward(const FeatureArgs<Scalar>* args) {
    return run_jobs<FeatureWorker<Scalar>>(*args, args->parts * args->heads,
                                           [](FeatureWorker<Scalar>& worker, long job) { worker.backward(job); });
}
long titans_layer_forward(const LayerArgs<Scalar>* args) {
    return guarded([&] { return layer_forward(*args); });
}
long titans_layer_backward(const LayerArgs<Scalar>* args) {
    return guarded([&] { return layer_backward(*args); });
}
long titans_segments_forward(const SegmentArgs<Scalar>* args) {
    return guarded([&] { return segments_forward(*args); });
}
long titans_segments_backward(const SegmentArgs<Scalar>* args) {
    return guarded([&] { return segments_backward(*args); });
}
}
