from sasa_train.benchmark import main

main()
