from sasa_train.demo import main

main()
