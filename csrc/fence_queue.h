// A queue of items that each wait for a step of the device, first in, first out. It is a ring buffer, which allocates
// memory only when it grows.
#pragma once

#include <cstdint>
#include <vector>

namespace internvl_rt {

template <class Item>
class FenceQueue {
 public:
  std::int64_t size() const noexcept { return static_cast<std::int64_t>(end_ - begin_); }
  void clear() noexcept { begin_ = end_; }

  // Makes room, so that the next `count` calls of push() allocate no memory and cannot fail.
  void reserve(std::int64_t count) {
    while (std::ssize(ring_) < size() + count) grow();
  }

  // The item waits for the step of the number `fence`.
  void push(std::int64_t fence, const Item& item) {
    if (size() == std::ssize(ring_)) grow();
    ring_[end_++ & (ring_.size() - 1)] = {fence, item};
  }

  // Removes the items at the front that wait for no step after `completed`, and calls `use` with each. An item never
  // overtakes an earlier one, even if it waits for an earlier step.
  template <class Use>
  void drain(std::int64_t completed, Use use) {
    while (begin_ != end_) {
      const Entry entry = ring_[begin_ & (ring_.size() - 1)];
      if (entry.fence > completed) return;
      ++begin_;
      use(entry.item);
    }
  }

  template <class Use>
  void for_each(Use use) const {
    for (std::size_t place = begin_; place != end_; ++place) use(ring_[place & (ring_.size() - 1)].item);
  }

 private:
  struct Entry {
    std::int64_t fence = 0;
    Item item{};
  };

  void grow() {
    std::vector<Entry> ring(2 * ring_.size());
    std::size_t end = 0;
    for (std::size_t place = begin_; place != end_; ++place) ring[end++] = ring_[place & (ring_.size() - 1)];
    ring_.swap(ring);
    begin_ = 0;
    end_ = end;
  }

  std::vector<Entry> ring_ = std::vector<Entry>(16);  // its size is always a power of two
  std::size_t begin_ = 0, end_ = 0;                   // they count up for ever; an index is their low bits
};

}  // namespace internvl_rt
