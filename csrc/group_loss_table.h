// The losses of group_epilogue as Python sees them.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "group_losses.h"

namespace robust_dpo {

using LossTable = std::vector<std::pair<std::string, std::vector<std::string>>>;

// (name, names of the options) in the order of their codes.
inline LossTable group_losses() {
    LossTable found;
    for_each_loss(GroupLosses{}, [&](auto loss) {
        using Loss = decltype(loss);
        std::vector<std::string> options;
        for (const char* option : Loss::kOptions)
            if (option != nullptr) options.emplace_back(option);
        found.emplace_back(Loss::kName, options);
    });
    return found;
}

}  // namespace robust_dpo
