from sasa_train.dataset_tool import main

main()
