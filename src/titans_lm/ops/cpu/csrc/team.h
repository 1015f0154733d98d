// Threads that process stages of jobs, one stage after another.

#pragma once
#include <atomic>
#include <condition_variable>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

#include "subnormals.h"

class Team {
  public:
    typedef std::function<void(long member, long job)> Act;

    // As many threads as the system gives, at most `members` with the caller's.
    explicit Team(long members) {
        try {
            while (long(others.size()) + 1 < members) {
                long member = others.size() + 1;
                others.emplace_back([this, member] { follow(member); });
            }
        } catch (const std::exception&) {
        }
    }

    ~Team() {
        {
            std::lock_guard<std::mutex> lock(mutex);
            over = true, ++stage;
        }
        started.notify_all();
        for (std::thread& t : others) t.join();
    }

    long members() const { return others.size() + 1; }
    bool failed() const { return failure; }

    // Run act(member, job) for every job, each in some member, and wait for all.
    void run(long count, const Act& action) {
        if (others.empty() || count < 2) {
            for (long job = 0; job < count; ++job) guarded(action, 0, job);
            return;
        }
        {
            std::lock_guard<std::mutex> lock(mutex);
            act = &action, jobs = count, next = 0, working = others.size(), ++stage;
        }
        started.notify_all();
        take_jobs(0);
        std::unique_lock<std::mutex> lock(mutex);
        finished.wait(lock, [this] { return working == 0; });
    }

  private:
    std::vector<std::thread> others;
    std::mutex mutex;
    std::condition_variable started, finished;
    const Act* act = nullptr;
    long jobs = 0, stage = 0, working = 0;
    std::atomic<long> next{0};
    std::atomic<bool> failure{false};
    bool over = false;

    void guarded(const Act& action, long member, long job) {
        try {
            action(member, job);
        } catch (const std::bad_alloc&) {
            failure = true;
        }
    }

    void take_jobs(long member) {
        for (long job; (job = next++) < jobs;) guarded(*act, member, job);
    }

    void follow(long member) {
        NoSubnormals while_computing;
        for (long seen = 0;;) {
            {
                std::unique_lock<std::mutex> lock(mutex);
                started.wait(lock, [&] { return stage != seen; });
                seen = stage;
                if (over) return;
            }
            take_jobs(member);
            std::lock_guard<std::mutex> lock(mutex);
            if (--working == 0) finished.notify_one();
        }
    }
};
