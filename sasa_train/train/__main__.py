from sasa_train.train import main

main()
